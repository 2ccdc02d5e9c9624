"""What the orchestrator knows of a rung beyond its recipe: how it is shown and checked."""

import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from vpmoe_assets.checks.check import Check


@dataclass(frozen=True)
class RungAsset:
    """One module of `vpmoe_assets.rungs` says this of its rung, under the name `RUNG`.

    Attributes:
        checks: Gets the recipe and returns the rung's checks, beyond that its files read back. What would
            make everything below wrong is blocking; what only says how much was lost is not.
        kinds: Dagster kinds.
    """

    checks: Callable[[Any], list[Check]]
    kinds: frozenset[str] = frozenset({"pytorch", "safetensors"})


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
