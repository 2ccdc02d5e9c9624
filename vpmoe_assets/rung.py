"""What the orchestrator knows of a rung beyond its recipe: how it is shown, checked and fingerprinted."""

import importlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vpmoe_assets.checks.check import Check

COMMON = (
    "trainer/checkpoints/format.py",
    "trainer/contract/canonical.py",
    "trainer/contract/geometry.py",
    "trainer/contract/layers.py",
    "trainer/contract/pattern.py",
    "trainer/contract/safetensors_header.py",
    *(f"trainer/surgery/{name}.py" for name in ("tensorfile", "tensors", "weights")),
)
"""Files whose code decides the bytes of every rung."""

CALIBRATED = (
    "trainer/contract/fusions.py",
    "trainer/contract/indexed.py",
    "trainer/contract/words.py",
    "trainer/data",
    "trainer/model",
    *(f"trainer/surgery/{name}.py" for name in ("calibration", "streams")),
)
"""And of those that are fitted on text."""


@dataclass(frozen=True)
class RungAsset:
    """One module of `vpmoe_assets.rungs` says this of its rung, under the name `RUNG`.

    Attributes:
        sources: Files whose code decides its bytes, beyond `COMMON`.
        checks: Gets the recipe and returns the rung's checks, beyond that its files read back. What would
            make everything below wrong is blocking; what only says how much was lost is not.
        kinds: Dagster kinds.
        external: Versions of programs of other projects that decide its bytes.
    """

    sources: Sequence[str]
    checks: Callable[[Any], list[Check]]
    kinds: frozenset[str] = frozenset({"pytorch", "safetensors"})
    external: Callable[[], Mapping[str, str]] | None = None


def load_rung(step: str) -> tuple[RungAsset, str]:
    """Return what `vpmoe_assets.rungs.<step>` says of its rung, and its docstring, the UI's description.

    Raises:
        LookupError: There is no such module, or it is not a rung's.
    """
    name = f"vpmoe_assets.rungs.{step}"
    try:
        module = importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != name:
            raise
        raise LookupError(f"a recipe has the step {step!r}, but there is no module {name}") from None
    rung = getattr(module, "RUNG", None)
    if not isinstance(rung, RungAsset) or not module.__doc__:
        raise LookupError(f"{name} describes no rung: it needs a docstring and RUNG, a RungAsset")
    return rung, inspect.cleandoc(module.__doc__)
