"""The steps of `convert` by their words: a recipe's `step` is the name of a module of this package."""

import ast
import importlib
import inspect
from pathlib import Path
from typing import TYPE_CHECKING, cast

from trainer.contract.schema.rungs.ladder import RECIPES

if TYPE_CHECKING:
    from trainer.surgery.step import Step

INTERFACE = {"convert": ["conversion", "out"], "check": ["conversion", "payload", "outcome"]}
"""Functions of a step's module, with their parameters; `trainer.surgery.step.Step` says what they do."""


def load_step(word: str) -> "Step":
    """Import the step of a recipe.

    Raises:
        LookupError: No recipe has that step, or its module is not one.
    """
    if word not in RECIPES:
        raise LookupError(f"step: found {word!r}; allowed: {', '.join(map(repr, RECIPES))}")
    name = f"{__package__}.{word}"
    module = importlib.import_module(name)
    for function, parameters in INTERFACE.items():
        found = getattr(module, function, None)
        if not callable(found) or list(inspect.signature(found).parameters) != parameters:
            raise LookupError(f"{name} is no step: it has no {function}({', '.join(parameters)})")
    return cast("Step", module)


def described_steps() -> str:
    """Return a line for each step, in the order of the ladder: its word and what its module says it does."""
    width = max(map(len, RECIPES))
    return "\n".join(f"  {word:{width}}  {_summary(word)}" for word in RECIPES)


def _summary(word: str) -> str:
    """First line of a step's docstring, read from the file: importing it would import torch."""
    source = (Path(__file__).parent / f"{word}.py").read_text(encoding="utf-8")
    return (ast.get_docstring(ast.parse(source)) or "").partition("\n")[0]
