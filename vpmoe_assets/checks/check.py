"""What a check is, and the one way to write one: a function under `check`."""

import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from trainer.contract.canonical import UnstableValueError, canonical_json, sha256_json
from vpmoe_assets.build import Published
from vpmoe_assets.codebase.definition import definition
from vpmoe_assets.codebase.syntax import parse, tree_digest
from vpmoe_assets.codebase.tree import SourceTree, current
from vpmoe_assets.verdict import Verdict

Run = Callable[[Published, Mapping[str, Published]], Verdict]
"""Gets the published artifact, and its inputs by name.

It may raise `vpmoe_assets.lineage.errors.EvidenceMissing` where it judges what a run left behind and that was
cleaned away; nothing is ever made again for a check.
"""


@dataclass(frozen=True)
class Check:
    """A check of a published artifact: run before anything is built on it, again when its code has changed.

    Its verdicts are statements about the record; it is no part of the artifact's identity.

    Attributes:
        name: Of the asset check.
        run: Finds out.
        blocking: A failure stops everything below, in this run and in later ones.
        description: What it holds the artifact to.
    """

    name: str
    run: Run
    blocking: bool
    description: str

    @property
    def version(self) -> str:
        """Of its code: what its function says, all that this uses, and what the function was given.

        Its name and the other checks of its module are no part of it.
        """
        given = {name: _stable(value, name) for name, value in sorted(_captured(self.run))}
        place = (self.run.__module__, self.run.__qualname__.partition(".")[0])
        return sha256_json({"code": _code(current(), *place), "given": given})

    @property
    def severity(self) -> str:
        """Of a failure, as the UI has it."""
        return "ERROR" if self.blocking else "WARN"


def check(name: str, *, blocking: bool = True, description: str | None = None) -> Callable[[Run], Check]:
    """Make a check of the function below.

    Args:
        name: Of the asset check, as statements and the UI have it.
        blocking: Whether a failure stops everything below.
        description: What it holds the artifact to, where that is not the function's docstring.
    """

    def decorate(run: Run) -> Check:
        return Check(name, run, blocking, description or inspect.getdoc(run) or "")

    return decorate


_WRITTEN_IN = ("vpmoe_assets.checks", "vpmoe_assets.rungs")
"""Where checks stand, many in a module."""


@cache
def _code(tree: SourceTree, module: str, name: str) -> str:
    if module in tree.modules:
        return definition(tree, module, name, decorator=check.__name__, followed=_WRITTEN_IN).digest
    path = Path(str(sys.modules[module].__file__))  # of a check that is not this project's: all of its file
    return tree_digest(parse(path.read_bytes(), str(path)))


def _captured(run: Run) -> Iterator[tuple[str, Any]]:
    """Yield what a function was given by the function that returned it, by name."""
    for name, cell in zip(run.__code__.co_freevars, run.__closure__ or (), strict=True):
        if not callable(cell.cell_contents):  # whose definition is part of the code
            yield name, cell.cell_contents


def _stable(value: Any, name: str) -> Any:
    """Return a value that has canonical JSON.

    Raises:
        UnstableValueError: It has none.
    """
    if isinstance(value, BaseModel):
        return {"is": type(value).__name__, **value.model_dump(mode="json")}
    try:
        canonical_json(value)
    except UnstableValueError as error:
        raise UnstableValueError(f"a check was given {name}, {error}") from None
    return value
