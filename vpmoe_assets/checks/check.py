"""What a check is, and the one way to write one: a function under `check`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from vpmoe_assets.build import Published
from vpmoe_assets.codebase.tree import current
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
        module: Where its code is.
    """

    name: str
    run: Run
    blocking: bool
    description: str
    module: str

    @property
    def version(self) -> str:
        """Of its code: the digest of its module and of what that runs."""
        return current().closure([self.module]).digest

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
        return Check(name, run, blocking, description or inspect.getdoc(run) or "", run.__module__)

    return decorate
