"""What a check is."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpmoe_assets.assets.making import Build, Published

Verdict = tuple[bool, str, Mapping[str, Any]]
"""Passed, one sentence, numbers worth keeping."""


@dataclass(frozen=True)
class Check:
    """A check of a filled payload: run before publishing, kept in the record, shown in the UI.

    Attributes:
        name: Of the asset check.
        run: Gets the build and the inputs by name.
        blocking: A failure stops everything below, in this run and in later ones.
        description: What it holds the payload to.
    """

    name: str
    run: Callable[["Build", Mapping[str, "Published"]], Verdict]
    blocking: bool = True
    description: str = ""
