"""Finished versions are put into their place: all of them or none, through a kill at any moment.

A finished version is a directory of the published layout in the work area, sealed and on the disk. Writing
down which of them belong where is the point of no return: from then on this process, or whoever next asks for
the work area, completes it. Every step may be done twice.
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_bytes, sync
from vpmoe_assets.lineage.changes import Changes
from vpmoe_assets.lineage.layout import Layout, make_directory, version_name
from vpmoe_assets.lineage.ledger import Ledger
from vpmoe_assets.lineage.record import RECORD_NAME, Record, read_record
from vpmoe_assets.lineage.statements import PROGRAM, Statement, Statements
from vpmoe_assets.lineage.workarea import WorkArea

_PLAN, _REPLACED = ".placing.json", ".replaced"


@dataclass(frozen=True, slots=True)
class Placement:
    """A finished version.

    Attributes:
        source: Its directory, relative to the work area.
        record_digest: Of its record, which lies in it.
        restored: Body of the statement that its files were made again; None for a new version.
    """

    source: str
    record_digest: str
    restored: Mapping[str, Any] | None = None


class Places:
    """Where finished versions go.

    Args:
        layout: Of the store.
        ledger: Of the store.
        statements: Of the store.
    """

    def __init__(self, layout: Layout, ledger: Ledger, statements: Statements) -> None:
        self._layout = layout
        self._ledger = ledger
        self._statements = statements
        self._changes = Changes(layout.root)

    def decide(self, work: WorkArea, placements: Sequence[Placement]) -> None:
        """Write down what is to be placed; from here on it will be, by `complete`."""
        plan = json.dumps([asdict(placement) for placement in placements])
        replace_bytes(work.path / _PLAN, plan.encode("ascii"))

    def decided(self, work: WorkArea) -> bool:
        """Whether something is to be placed."""
        return (work.path / _PLAN).exists()

    def complete(self, work: WorkArea) -> list[Record]:
        """Put what was decided on into its place, under the asset's lock, and return the records."""
        plan = json.loads((work.path / _PLAN).read_bytes())
        return [self._complete(work, Placement(**fields)) for fields in plan]

    def _complete(self, work: WorkArea, placement: Placement) -> Record:
        source = work.path / placement.source
        if source.exists():
            record = read_record(source / RECORD_NAME)
            self._ledger.put(record, source)
            with self._changes.noted(version_name(record)):
                self._move(work, source, self._layout.directory(record))
        else:
            found = self._ledger.get(placement.record_digest)
            assert found is not None, "what was moved had been put into the ledger"
            record = found
        if placement.restored is not None:
            self._state(record, placement.restored)
        return record

    def _move(self, work: WorkArea, source: Path, target: Path) -> None:
        """Move a version to its place; what was damaged there is put aside, and goes with the work area."""
        make_directory(target.parent)
        if target.exists():
            aside = work.path / _REPLACED / target.name
            shutil.rmtree(aside, ignore_errors=True)
            aside.parent.mkdir(exist_ok=True)
            target.rename(aside)
        source.rename(target)
        sync(target.parent)
        sync(source.parent)

    def _state(self, record: Record, body: Mapping[str, Any]) -> None:
        said = self._statements.about(record)
        if not any(statement.kind == "restored" and statement.body == dict(body) for statement in said):
            self._statements.append(Statement.about(record, "restored", body, author=PROGRAM))
