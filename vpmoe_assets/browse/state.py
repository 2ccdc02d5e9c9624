"""Where an artifact stands, in a word and a sentence, for tables and badges."""

from dataclasses import dataclass
from typing import Literal

from vpmoe_assets.browse.catalog import View
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

Word = Literal["up to date", "stale", "blocked", "damaged", "superseded", "unreadable"]
LOOKED_AT = 20_000
"""Files whose sizes are looked at for one page."""


@dataclass(frozen=True)
class State:
    """Where an artifact stands.

    Attributes:
        word: In a word.
        why: In a sentence; empty where the word says it all.
    """

    word: Word
    why: str = ""

    @property
    def css(self) -> str:
        """Its class in the style sheet."""
        return self.word.replace(" ", "-")


def state_of(store: Store, view: View, record: Record, stale: str | None, *, look: bool = True) -> State:
    """Return where an artifact stands, the worst first.

    Args:
        store: It lies in.
        view: Of the store.
        record: Of the artifact.
        stale: Why present code, recipe or inputs would make another, if they would.
        look: Whether its files are looked at: that they are there, and of what size.
    """
    if look and (damage := payload_problems(store.directory(record), record, None)):
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        return State("damaged", f"{damage[0].path} {damage[0].message}{more}")
    if blocking := store.blocked_by(record):
        return State("blocked", f"{blocking[0].check}: {blocking[0].reason or blocking[0].outcome}")
    if not view.is_latest(record):
        newest = view.assets[record.experiment][record.asset].latest
        return State("superseded", f"{newest.version if newest else version_name(record)} is newer")
    return State("stale", stale) if stale else State("up to date")
