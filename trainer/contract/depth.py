"""Where a deeper model's layers come from: whole blocks move and are copied, so each layer keeps its kind."""

from dataclasses import dataclass

BLOCK_LAYERS = 4
"""Layers that move together: one period of three local layers and a global one."""


@dataclass(frozen=True)
class Origin:
    """Where one layer of the deeper model comes from.

    Attributes:
        source: 1-based number of the parent's layer whose tensors it takes.
        inserted: Whether it is new (its residual branches start at zero), or the parent's own.
    """

    source: int
    inserted: bool


def layer_origins(parent_layers: int, target_layers: int) -> tuple[Origin, ...]:
    """Return the origin of each layer of the deeper model, first to last.

    Of n blocks among n', block b moves to `⌊n' b / n⌋`, which spreads them evenly and leaves the first
    where it is (from 7 to 20 blocks: 0, 2, 5, 8, 11, 14, 17). A block in between copies the nearest old
    block before it. A layer's place within its block never changes, so a local layer stays local, a
    global one global, and layer 1 stays layer 1.

    Args:
        parent_layers: Depth of the parent, a multiple of `BLOCK_LAYERS`.
        target_layers: Depth of the result, a multiple too and at least the parent's.

    Raises:
        ValueError: A depth that the rule does not cover.
    """
    for whose, layers in (("parent", parent_layers), ("target", target_layers)):
        if layers < 1 or layers % BLOCK_LAYERS:
            raise ValueError(
                f"the {whose} has num_layers = {layers}; depth is expanded by whole blocks, so it must be a "
                f"positive multiple of {BLOCK_LAYERS}"
            )
    if target_layers < parent_layers:
        raise ValueError(
            f"the target has num_layers = {target_layers}, less than the parent's {parent_layers}; depth "
            "expansion only adds layers"
        )
    old, new = parent_layers // BLOCK_LAYERS, target_layers // BLOCK_LAYERS
    moved = {new * block // old: block for block in range(old)}
    origins: list[Origin] = []
    source = 0
    for block in range(new):
        source = moved.get(block, source)
        origins += [
            Origin(source * BLOCK_LAYERS + place + 1, block not in moved) for place in range(BLOCK_LAYERS)
        ]
    return tuple(origins)


def inserted_layers(parent_layers: int, target_layers: int) -> tuple[int, ...]:
    """1-based numbers of the deeper model's new layers; see `layer_origins`."""
    origins = layer_origins(parent_layers, target_layers)
    return tuple(number for number, origin in enumerate(origins, start=1) if origin.inserted)
