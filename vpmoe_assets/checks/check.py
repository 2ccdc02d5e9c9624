"""What a check is, and the one way to write one: a function under `check`."""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.contract.status import SUMMARY_NAME
from vpmoe_assets.build import Build, Published
from vpmoe_assets.verdict import Verdict

Run = Callable[[Build, Mapping[str, Published]], Verdict]
"""Gets the build with its payload filled, and the inputs by name."""


@dataclass(frozen=True)
class Check:
    """A check of a filled payload: run before publishing, kept in the record, shown in the UI.

    Attributes:
        name: Of the asset check.
        run: Finds out.
        blocking: A failure stops everything below, in this run and in later ones.
        description: What it holds the payload to.
    """

    name: str
    run: Run
    blocking: bool
    description: str


def check(name: str, *, blocking: bool = True, description: str | None = None) -> Callable[[Run], Check]:
    """Make a check of the function below.

    Args:
        name: Of the asset check, as records and the UI have it.
        blocking: Whether a failure stops everything below.
        description: What it holds the payload to, where that is not the function's docstring.
    """

    def decorate(run: Run) -> Check:
        return Check(name, run, blocking, description or inspect.getdoc(run) or "")

    return decorate


def job_summary(build: Build) -> dict[str, Any]:
    """Return what the build's job says of its deliverable."""
    import orjson

    return dict(orjson.loads((build.work.output / SUMMARY_NAME).read_bytes()))
