"""Which layers see a window and which see everything, from the three numbers that say so."""

from typing import Literal

LayerKind = Literal["local", "global"]


def layer_pattern(
    num_layers: int, window_size: int, skip_freq: int | tuple[int, ...] | None
) -> tuple[LayerKind, ...]:
    """Return the kind of each layer, first to last: `local` (window) or `global` (full causal).

    Args:
        num_layers: How many.
        window_size: Keys that a local layer sees; 0 makes every layer global.
        skip_freq: n makes every n-th layer global; a tuple gives each layer its kind, 1 = local; None makes
            every layer local.
    """
    if window_size == 0:
        flags: tuple[int, ...] = (0,) * num_layers
    elif skip_freq is None:
        flags = (1,) * num_layers
    elif isinstance(skip_freq, int):
        flags = tuple(int(number % skip_freq != 0) for number in range(1, num_layers + 1))
    else:
        flags = skip_freq
    kinds: tuple[LayerKind, LayerKind] = ("global", "local")
    return tuple(kinds[flag] for flag in flags)
