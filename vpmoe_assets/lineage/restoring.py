"""Versions that were removed or damaged, restored under their own records when their content is there again.

A record names its inputs' records, so what was made from a version verifies only with that very record. The
ledger keeps the record's bytes and the manifest's; the payload has the same digest by being made again, or in
another version. What cannot be made again is the evidence of the run: files of it that are intact stay, those
that came out the same are taken from the repetition, and the statement names the rest as lost.
"""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.collected import removed_on_purpose
from vpmoe_assets.lineage.digest import FileEntry, tree_files
from vpmoe_assets.lineage.errors import RecordError, UnsafePathError
from vpmoe_assets.lineage.hashcache import HashCache
from vpmoe_assets.lineage.headcache import Heads
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.layout import Layout, version_name
from vpmoe_assets.lineage.ledger import Ledger
from vpmoe_assets.lineage.linking import link_file, link_tree
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, Record
from vpmoe_assets.lineage.sealing import seal, write_sealed
from vpmoe_assets.lineage.statements import Statements

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Content:
    """What was made, or is there, of one fingerprint.

    Attributes:
        directory: Of the published layout.
        digest: Of the payload.
        manifest: Digest of the manifest's content without its volatile fields, where there is a manifest.
        run_files: Of `run/`.
    """

    directory: Path
    digest: str
    manifest: str | None
    run_files: Sequence[FileEntry]


class Restorer:
    """Finds and prepares what a store has lost.

    Args:
        layout: Of the store.
        ledger: Of the store.
        heads: Of the store.
        statements: Of the store.
        hasher: Digests of published files.
    """

    def __init__(
        self, layout: Layout, ledger: Ledger, heads: Heads, statements: Statements, hasher: HashCache
    ) -> None:
        self._layout = layout
        self._ledger = ledger
        self._heads = heads
        self._statements = statements
        self._hasher = hasher

    def lost(
        self, experiment: str, asset: str, fingerprint: str, content: Content, *, collected: bool
    ) -> list[Record]:
        """Return the records of an asset with this content whose version is not what was published.

        Args:
            experiment: Name.
            asset: Name.
            fingerprint: Theirs.
            content: Theirs.
            collected: Whether those count that were removed on purpose.
        """
        found = []
        for record in self.known(experiment, asset, fingerprint):
            manifest = None if record.manifest is None else record.manifest.content_sha256
            if (record.digest, manifest) != (content.digest, content.manifest) or not self._is_lost(record):
                continue
            if collected or not self._collected(record):
                found.append(record)
        return sorted(found, key=lambda record: record.sequence)

    def known(self, experiment: str | None, asset: str, fingerprint: str) -> Iterator[Record]:
        """Yield the ledger's records of an asset with a fingerprint, newest first.

        Args:
            experiment: Name; None for those of every experiment.
            asset: Name.
            fingerprint: Theirs.
        """
        for entry in reversed(self._ledger.of_fingerprint(fingerprint)):
            if entry.asset != asset or experiment not in (None, entry.experiment):
                continue
            try:
                record = self._ledger.get(entry.record_digest)
            except RecordError as error:
                _log.warning("%s", error)
                continue
            if record is not None and record.fingerprint == fingerprint and record.asset == asset:
                yield record

    def prepare(
        self, record: Record, content: Content, target: Path, run: str | None
    ) -> dict[str, Any] | None:
        """Make the whole directory of a lost version, sealed, with its payload and evidence linked.

        Args:
            record: Of the version.
            content: With the payload of its digest.
            target: New directory.
            run: Id of the Dagster run in which this happens.

        Returns:
            The body of the statement: `run`, `lost` and `repeated` (paths in `run/` that are gone, or come
            from the repetition). None where the manifest is gone for good.
        """
        there = self._layout.directory(record)
        manifest = self._manifest(record, [there, content.directory])
        if record.manifest is not None and manifest is None:
            _log.warning("%s: cannot be restored, for its manifest is gone", version_name(record))
            return None
        link_tree(content.directory / "payload", target / "payload")
        (target / "run").mkdir()
        if manifest is not None:
            write_sealed(target / MANIFEST_NAME, manifest.read_bytes())
        intact, lost = self.evidence(record.run_files, there / "run")
        for name, path in intact.items():
            link_file(path, target / "run" / name)
        repeated = [entry.path for entry in lost if entry in content.run_files]
        for name in repeated:
            link_file((content.directory / "run" / name).resolve(), target / "run" / name)
        write_sealed(target / RECORD_NAME, self._ledger.path(record.record_digest).read_bytes())
        seal(target)
        gone = sorted(entry.path for entry in lost if entry.path not in repeated)
        return {"run": run, "lost": gone, "repeated": repeated}

    def evidence(self, entries: Sequence[FileEntry], run: Path) -> tuple[dict[str, Path], list[FileEntry]]:
        """Return the files of `run/` that are what was recorded, and the entries of the others."""
        try:
            found = dict(tree_files(run)) if run.is_dir() else {}
        except UnsafePathError:
            found = {}
        there = [entry for entry in entries if entry.path in found]
        digests = self._hasher([found[entry.path] for entry in there])
        intact = {
            entry.path: found[entry.path]
            for entry, digest in zip(there, digests, strict=True)
            if digest == entry.sha256
        }
        return intact, [entry for entry in entries if entry.path not in intact]

    def _is_lost(self, record: Record) -> bool:
        try:
            head = self._heads.of_version(record.experiment, record.asset, record.version)
        except RecordError:
            return True
        if head is None:
            return True
        if head.record_digest != record.record_digest:
            # Rewritten by hand, or a name that was given twice, before names were counted.
            return not self._ledger.path(head.record_digest).exists()
        return bool(payload_problems(self._layout.directory(record), record, self._hasher))

    def _collected(self, record: Record) -> bool:
        return removed_on_purpose(self._statements.about(record))

    def _manifest(self, record: Record, directories: Sequence[Path]) -> Path | None:
        """Return a file with the very bytes of a record's manifest."""
        if record.manifest is None:
            return None
        kept = self._ledger.manifest(record.manifest.sha256)
        for path in (kept, *(directory / MANIFEST_NAME for directory in directories)):
            if path.is_file() and self._hasher([path]) == [record.manifest.sha256]:
                return path
        return None
