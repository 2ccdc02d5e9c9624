"""Literals of a module, read from its source: what it says is known where it cannot be imported."""

import ast
from pathlib import Path
from typing import Any


def literal_of(module: Path, name: str, what: str) -> Any:
    """Read what a module assigns to a name.

    Args:
        module: The file.
        name: Of the assignment, at the top level.
        what: What it is, for the message.

    Raises:
        ValueError: It assigns no literal of that name.
    """
    for node in ast.parse(module.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == name for target in node.targets
        ):
            return ast.literal_eval(node.value)
    raise ValueError(f"{module} assigns no {name}, {what}")
