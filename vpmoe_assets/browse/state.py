"""Where an artifact stands, in a word and a sentence, for tables and badges."""

from dataclasses import dataclass
from typing import Literal

from vpmoe_assets.browse.catalog import View
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.staleness import Standing
from vpmoe_assets.lineage.store import Store

Word = Literal["fresh", "stale", "unknown", "blocked", "damaged", "superseded", "unreadable", "missing"]


@dataclass(frozen=True)
class State:
    """Where an artifact stands.

    Attributes:
        word: In a word, as `vpmoe ls` has it.
        why: In a sentence; empty where the word says it all.
    """

    word: Word
    why: str = ""


def state_of(store: Store, view: View, record: Record, standing: Standing | None) -> State:
    """Return where an artifact stands.

    Args:
        store: It lies in.
        view: Of its experiment.
        record: Of the artifact.
        standing: Of the latest version of its asset, where that was compared.
    """
    if damage := payload_problems(store.directory(record), record, None):
        more = f" and {len(damage) - 1} more" if len(damage) > 1 else ""
        return State("damaged", f"{damage[0].path} {damage[0].message}{more}")
    if blocking := store.blocked_by(record):
        return State("blocked", f"check {blocking[0].check}: {blocking[0].reason or blocking[0].outcome}")
    compared = None if standing is None else standing.record
    if standing is not None and compared is not None and compared.record_digest == record.record_digest:
        return State(standing.state, standing.summary.partition(": ")[2])
    newest = view.assets[record.asset].latest
    if newest is not None and newest.version != record.version:
        return State("superseded", f"{newest.version} is newer")
    return State("fresh")
