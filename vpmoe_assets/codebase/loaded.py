"""What a process really loaded of this project: evidence beside the closure, which is only computed."""

import ast
import json
import sys
from collections.abc import Iterable, Set
from pathlib import Path

from trainer.contract.canonical import canonical_json
from trainer.contract.files import replace_text
from trainer.contract.status import MODULES_NAME
from vpmoe_assets.codebase.bystanders import bystander
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.syntax import tree_digest
from vpmoe_assets.codebase.tree import PACKAGES, SourceTree

_SAYS_NOTHING = tree_digest(ast.Module([], []))


def loaded_modules() -> list[str]:
    """Return the modules of this project that this process has loaded by now, sorted."""
    return sorted(name for name in list(sys.modules) if name.partition(".")[0] in PACKAGES)


def witnessed(output: Path, run: Path, before: Set[str]) -> list[str]:
    """Return the modules that were loaded to make something, and keep the evidence beside it.

    Where a job made it, the job has left its own. Else this process did; it may have made other things
    before, so what it had loaded by then says nothing about this one.

    Args:
        output: Where a job delivers.
        run: Of the work area, for this process's evidence.
        before: Modules that this process had loaded when it began.
    """
    if (left := output / MODULES_NAME).exists():
        return [str(name) for name in json.loads(left.read_bytes())]
    loaded = loaded_modules()
    replace_text(run / MODULES_NAME, canonical_json(loaded, indent=1) + "\n")
    return [name for name in loaded if name not in before]


def standing_by(tree: SourceTree) -> set[str]:
    """Return the modules that may be loaded beside any step.

    They are the bystanders, and what those bring along by an import at their top level. What a bystander
    imports inside a function is not excused: an asset's function imports its step so. And packages whose
    `__init__` holds a docstring and no more: whoever lists one loads it.
    """
    packages = {name for name, path in tree.modules.items() if tree.facts(path).digest == _SAYS_NOTHING}
    return packages | tree.brought_along(name for name in tree.modules if bystander(name) is not None)


def unexplained(tree: SourceTree, closure: Closure, loaded: Iterable[str]) -> list[str]:
    """Return the loaded modules that are neither in a step's closure nor stand by, sorted.

    Args:
        tree: The sources.
        closure: Of the step.
        loaded: By the process that made it.
    """
    code = {name for name, path in tree.modules.items() if path in closure.sources}
    return sorted(set(loaded) - code - standing_by(tree))
