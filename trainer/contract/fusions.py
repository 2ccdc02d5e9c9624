"""Fusions: keys of the `moe` table that ask a backend for a faster way to the same numbers.

They are no geometry. Each backend says which of them it honours, in a literal that is read here without
importing the module, so that a config is checked where there is no torch.
"""

from collections.abc import Iterable
from pathlib import Path

from trainer.contract.literals import literal_of
from trainer.contract.words import BACKENDS, words

FUSIONS = ("grouped_gemm", "permute_fusion", "router_fusion")


def asked_fusions(moe: object) -> tuple[str, ...]:
    """Names of the fusions that are true in a `moe` table; none without a table."""
    return tuple(name for name in FUSIONS if getattr(moe, name, False))


def require_fusions(backend: str, asked: Iterable[str]) -> None:
    """Refuse a fusion that a backend does not honour; it is never switched off silently.

    Args:
        backend: Name of a module of `trainer.model.backends`.
        asked: Of `asked_fusions`.

    Raises:
        ValueError: Naming the key, its value, the backend and the remedies.
    """
    honoured = {word: fusions_of(path) for word, path in words(BACKENDS).items()}
    for name in asked:
        if name not in honoured[backend]:
            able = [word for word, names in honoured.items() if name in names]
            other = f", or training.backend to {' or '.join(map(repr, able))}" if able else ""
            raise ValueError(
                f"moe.{name} = true, but training.backend = {backend!r} does not have it; "
                f"set moe.{name} = false{other}"
            )


def fusions_of(module: Path) -> frozenset[str]:
    """Read what a backend's module assigns to `FUSIONS`.

    Args:
        module: The file.

    Raises:
        ValueError: It assigns no literal of that name.
    """
    return frozenset(literal_of(module, "FUSIONS", "the tuple of fusions that the backend honours"))
