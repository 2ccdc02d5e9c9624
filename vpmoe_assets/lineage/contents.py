"""What the index has of one experiment, against what the records say."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Self

from vpmoe_assets.lineage.errors import IndexCorruptError, IndexLockedError
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

_TABLES = ("artifacts", "inputs", "files", "shards", "checks")


@dataclass(frozen=True)
class Contents:
    """The rows of an experiment, counted.

    Attributes:
        digests: Record digest by artifact (`experiment/asset/version`).
        counts: Number of rows by table and artifact.
        changing: Artifacts whose present state may not be in the index yet.
    """

    digests: Mapping[str, str]
    counts: Mapping[tuple[str, str], int]
    changing: frozenset[str]

    @classmethod
    def of(cls, index: Index, experiment: str) -> Self:
        """Count the rows of an experiment.

        Raises:
            IndexLockedError: Another process is writing and did not finish in time.
            IndexCorruptError: The file is missing or unreadable.
        """
        parts = [
            "SELECT 'digest', asset, version, record_digest FROM artifacts WHERE experiment = ?",
            *(
                f"SELECT '{table}', asset, version, count(*)::VARCHAR FROM {table} WHERE experiment = ?"
                " GROUP BY ALL"
                for table in _TABLES
            ),
        ]
        rows = index.query(" UNION ALL ".join(parts), (experiment,) * len(parts)).rows
        told = [
            (str(what), f"{experiment}/{asset}/{version}", str(said)) for what, asset, version, said in rows
        ]
        return cls(
            {artifact: said for what, artifact, said in told if what == "digest"},
            {(what, artifact): int(said) for what, artifact, said in told if what != "digest"},
            frozenset(index.changing()),
        )

    def totals(self) -> dict[str, int]:
        """Return the number of rows by table."""
        return {
            table: sum(count for (name, _), count in self.counts.items() if name == table)
            for table in _TABLES
        }

    def differences(self, records: Sequence[Record], store: Store) -> list[str]:
        """Say where the index has not what the records say; what is changing right now is left out."""
        found = []
        for record in records:
            name = version_name(record)
            if name not in self.changing and (difference := self._difference(name, record, store)):
                found.append(f"{name}: {difference}")
        return found

    def _difference(self, name: str, record: Record, store: Store) -> str | None:
        if name not in self.digests:
            return "not in the index"
        if self.digests[name] != record.record_digest:
            return "another record in the index"
        stated = {
            "inputs": len(record.inputs),
            "files": len(record.files) + len(record.run_files) + (record.manifest is not None),
            "checks": len(store.findings(record)),
        }
        for table, count in stated.items():
            if (there := self.counts.get((table, name), 0)) != count:
                return f"{there} {table}, {count} in the record"
        return None


def make_up(index: Index, store: Store, experiment: str, records: Sequence[Record]) -> str | None:
    """Bring what the index has missed of an experiment into it.

    Rows of a record that was rewritten stay: the index is a witness of what was there.

    Returns:
        None, or what could not be done, for a log.
    """
    try:
        known = Contents.of(index, experiment).digests
    except (IndexCorruptError, IndexLockedError):
        # One is enough for it to be looked at, and made again where it is corrupt.
        return index.update(store, also=[version_name(record) for record in records[:1]])
    return index.update(store, also=[name for each in records if (name := version_name(each)) not in known])
