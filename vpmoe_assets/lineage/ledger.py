"""The ledger: what was ever published, kept apart from where it lies.

::

    artifacts/.records/<first 2 hex digits>/<record digest>.json      the bytes of every record
    artifacts/.records/manifests/<first 2>/<sha256>.json              the manifests that they name
    artifacts/.records/by-fingerprint/<first 2>/<fingerprint>         who has this fingerprint, one a line
    artifacts/.records/counters/<experiment>/<asset>.json             see `vpmoe_assets.lineage.counters`

All of it is copies, on disk before a record becomes visible, so that a version which is removed or damaged
can be restored under its own record, and a fingerprint is found in whichever experiment it was made. A line
may be torn by a kill, and may name a record that never became visible: whoever follows it looks.
"""

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.files import sync
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.layout import make_directory
from vpmoe_assets.lineage.readings import Readings, files_below
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, Record, read_record
from vpmoe_assets.lineage.sealing import write_sealed

DIRECTORY = ".records"


@dataclass(frozen=True, slots=True)
class Entry:
    """A line of the index of fingerprints: who published something with it."""

    record_digest: str
    experiment: str
    asset: str
    version: str


class Ledger:
    """The ledger of a store.

    Args:
        root: Of the store.
    """

    def __init__(self, root: Path) -> None:
        self.root = root / DIRECTORY

    def put(self, record: Record, directory: Path) -> None:
        """Remember a record; it is on the disk when this returns.

        Args:
            record: That is, or is about to be, published.
            directory: Where its file and its manifest are.
        """
        if record.manifest is not None:
            _write(self.manifest(record.manifest.sha256), (directory / MANIFEST_NAME).read_bytes())
        _write(self.path(record.record_digest), (directory / RECORD_NAME).read_bytes())
        entry = Entry(record.record_digest, record.experiment, record.asset, record.version)
        if entry not in self.of_fingerprint(record.fingerprint):
            self._append(record.fingerprint, entry)

    def path(self, record_digest: str) -> Path:
        """Return the file with the bytes of a record, whether it exists or not."""
        return self.root / record_digest[:2] / f"{record_digest}.json"

    def manifest(self, sha256: str) -> Path:
        """Return the file with the bytes of a manifest, whether it exists or not."""
        return self.root / "manifests" / sha256[:2] / f"{sha256}.json"

    def get(self, record_digest: str) -> Record | None:
        """Return a record, or None where it is unknown.

        Raises:
            RecordError: The copy was altered.
        """
        path = self.path(record_digest)
        try:
            record = read_record(path)
        except FileNotFoundError:
            return None
        if record.record_digest != record_digest:
            raise RecordError(f"{path}: is the record of digest {record.record_digest}")
        return record

    def digests(self) -> Iterator[str]:
        """Yield the digest of every record, sorted."""
        yield from sorted(path.stem for path in self.root.glob("[0-9a-f][0-9a-f]/*.json"))

    def entries(self, readings: Readings | None = None) -> Iterator[Entry]:
        """Yield who published anything, in no order; it may never have become visible.

        Args:
            readings: Remembers what the files of the index say; by default each is read.
        """
        files = dict(files_below(self.root / "by-fingerprint", 1))
        for text in (readings or Readings())(files, _text).values():
            yield from _parsed(text)

    def of_fingerprint(self, fingerprint: str) -> list[Entry]:
        """Return who published something with a fingerprint, oldest first."""
        return _entries(self._fingerprint(fingerprint))

    def knows(self, record_digest: str, fingerprint: str, version: str) -> bool:
        """Whether it has a record, and what was published under that fingerprint and version."""
        return self.path(record_digest).exists() and any(
            entry.version == version for entry in self.of_fingerprint(fingerprint)
        )

    def _fingerprint(self, fingerprint: str) -> Path:
        return self.root / "by-fingerprint" / fingerprint[:2] / fingerprint

    def _append(self, fingerprint: str, entry: Entry) -> None:
        path = self._fingerprint(fingerprint)
        make_directory(path.parent)
        # A line of its own whatever came before: one write, no lock.
        line = f"\n{entry.record_digest} {entry.experiment} {entry.asset} {entry.version}\n"
        descriptor = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
        try:
            os.write(descriptor, line.encode("ascii"))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        sync(path.parent)


def _entries(path: Path) -> list[Entry]:
    text = _text(path)
    return [] if text is None else _parsed(text)


def _text(path: Path) -> str | None:
    try:
        return path.read_text("ascii", errors="replace")
    except FileNotFoundError:
        return None


def _parsed(text: str) -> list[Entry]:
    fields = (line.split(" ") for line in text.split("\n"))
    return list(dict.fromkeys(Entry(*each) for each in fields if len(each) == 4 and len(each[0]) == 64))


def _write(path: Path, content: bytes) -> None:
    """Write a file that is read-only from then on, unless it is there with this content."""
    with contextlib.suppress(FileNotFoundError):
        if path.read_bytes() == content:
            return
    make_directory(path.parent)
    write_sealed(path, content)
