"""What a record says of itself against what it names: fingerprint, snapshot, packages, manifest, ledger.

The digests of a record prove that it was not altered by accident. That it tells the truth about itself is
another question: whether its fingerprint was taken over its inputs, whether the code that the fingerprint
names is the code in its snapshot, whether the copy in the ledger is the same.
"""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from trainer.contract.canonical import UnstableValueError, sha256_json
from vpmoe_assets.codebase.facts import facts_of
from vpmoe_assets.codebase.snapshot import SnapshotError, unpack
from vpmoe_assets.codebase.syntax import SourceError
from vpmoe_assets.lineage.adoption import is_adopted, origin
from vpmoe_assets.lineage.errors import ObjectDamaged, ObjectMissing, RecordError
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.ledger import DIRECTORY, Entry
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.provenance import source_digest
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.volatile import without_volatile

_LOCK = "requirements.lock"


class RecordAudit:
    """Callable with a record; yields what does not hold. What records share is read once.

    Args:
        store: Where they lie.
    """

    def __init__(self, store: Store) -> None:
        self._store = store
        self._objects = ObjectStore(store.root)
        self._snapshots: dict[str, _Snapshot] = {}
        self._digests: dict[tuple[str, str], str] = {}

    def __call__(self, record: Record) -> Iterator[Problem]:
        """Yield what does not hold of a record whose own digests agree."""
        yield from _fingerprint_problems(record)
        yield from self._source_problems(record)
        yield from self._package_problems(record)
        yield from self._manifest_problems(record)
        yield from self._ledger_problems(record)

    def _source_problems(self, record: Record) -> Iterator[Problem]:
        name, sha256 = version_name(record), record.objects.sources
        if sha256 is None:
            if not record.earlier:
                message = (
                    f"{origin(record)}: there is no code to compare"
                    if is_adopted(record)
                    else "no snapshot of its sources was kept, so its fingerprint's code was not compared"
                )
                yield Problem("sources", name, RECORD_NAME, message, "note")
            return
        try:
            kept = self._snapshot(sha256)
        except (ObjectMissing, ObjectDamaged):
            return  # reported with the objects
        except SnapshotError as error:
            yield Problem("sources", name, RECORD_NAME, f"its snapshot {sha256[:12]}: {error}")
            return
        stated: dict[str, str] = record.fingerprint_payload.get("sources", {})
        for path, digest in sorted(stated.items()):
            found = self._code_digest(path, kept.content[path]) if path in kept.content else None
            if found != digest:
                there = "is not there" if found is None else f"has code digest {found}"
                message = (
                    f"its fingerprint has {path} with {digest}, which {there} in its snapshot {sha256[:12]}"
                )
                yield Problem("sources", name, RECORD_NAME, message)
        if record.attempts:
            return  # a job that an earlier run began delivers with that run's snapshot: the rest may differ
        if kept.digest != record.code.source_digest:
            message = f"its source digest is {record.code.source_digest}, that of its snapshot {kept.digest}"
            yield Problem("sources", name, RECORD_NAME, message)
        lock = hashlib.sha256(kept.content[_LOCK]).hexdigest() if _LOCK in kept.content else None
        if (stated_lock := record.environment.get("lock_digest")) is not None and lock != stated_lock:
            message = f"its lock digest is {stated_lock}, that of {_LOCK} in its snapshot {lock}"
            yield Problem("sources", name, RECORD_NAME, message)

    def _snapshot(self, sha256: str) -> "_Snapshot":
        if sha256 not in self._snapshots:
            content = unpack(self._objects.get(sha256))
            self._snapshots[sha256] = _Snapshot(content, source_digest(content))
        return self._snapshots[sha256]

    def _code_digest(self, path: str, content: bytes) -> str:
        key = path, hashlib.sha256(content).hexdigest()
        if key not in self._digests:
            try:
                self._digests[key] = facts_of(content, path).digest
            except SourceError:
                self._digests[key] = f"none, being no Python ({key[1]})"
        return self._digests[key]

    def _package_problems(self, record: Record) -> Iterator[Problem]:
        if record.objects.packages is None:
            return
        try:
            listed = self._objects.get_json(record.objects.packages)
            installed = {_plain(each["name"]): each["version"] for each in listed}
        except (ObjectMissing, ObjectDamaged):
            return  # reported with the objects
        except (ValueError, TypeError, KeyError) as error:
            message = f"its list of packages {record.objects.packages[:12]} is none: {error!r}"
            yield Problem("fingerprint", version_name(record), RECORD_NAME, message)
            return
        stated: dict[str, str] = record.fingerprint_payload.get("packages", {})
        for package, version in sorted(stated.items()):
            if (found := installed.get(_plain(package))) != version:
                listed_as = found or "none"
                message = f"its fingerprint has {package} {version}, its list of packages {listed_as}"
                yield Problem("fingerprint", version_name(record), RECORD_NAME, message)

    def _manifest_problems(self, record: Record) -> Iterator[Problem]:
        if record.manifest is None:
            return
        try:
            content = (self._store.directory(record) / MANIFEST_NAME).read_bytes()
        except OSError:
            return  # reported with the files
        if hashlib.sha256(content).hexdigest() != record.manifest.sha256:
            return
        if (found := _content_digest(content)) != record.manifest.content_sha256:
            message = f"content digest {found}, the record has {record.manifest.content_sha256}"
            yield Problem("manifest", version_name(record), MANIFEST_NAME, message)

    def _ledger_problems(self, record: Record) -> Iterator[Problem]:
        ledger = self._store.ledger
        if record.earlier and not ledger.root.is_dir():
            return  # of a store from before there was one; the index and statements were asked
        name, path = version_name(record), ledger.path(record.record_digest)
        shown = path.relative_to(self._store.root).as_posix()
        try:
            if ledger.get(record.record_digest) is None:
                message = "the ledger has no copy of this record; `vpmoe index rebuild` adds it"
                yield Problem("ledger", name, shown, message)
                return
            here = self._store.directory(record) / RECORD_NAME
            if path.read_bytes() != here.read_bytes():
                yield Problem("ledger", name, shown, "the ledger's copy has other bytes than the record")
        except RecordError as error:
            yield Problem("ledger", name, shown, f"the ledger's copy was altered: {error}")
        entry = Entry(record.record_digest, record.experiment, record.asset, record.version)
        if entry not in ledger.of_fingerprint(record.fingerprint):
            message = "the ledger does not name it under its fingerprint; `vpmoe index rebuild` adds it"
            yield Problem("ledger", name, f"{DIRECTORY}/by-fingerprint", message)
        if (manifest := record.manifest) is not None:
            copy = ledger.manifest(manifest.sha256)
            found = hashlib.sha256(copy.read_bytes()).hexdigest() if copy.is_file() else None
            if found != manifest.sha256:
                said = "is missing" if found is None else f"has sha256 {found}"
                shown = copy.relative_to(self._store.root).as_posix()
                yield Problem("ledger", name, shown, f"the ledger's copy of its manifest {said}")


@dataclass(frozen=True)
class _Snapshot:
    """Kept sources: their bytes by path, and the Merkle root of all."""

    content: Mapping[str, bytes]
    digest: str


def _fingerprint_problems(record: Record) -> Iterator[Problem]:
    """Yield where the fingerprint, which is the hash of its payload, was taken over other things."""
    name, payload = version_name(record), record.fingerprint_payload
    found = sha256_json(payload)
    if found != record.fingerprint:
        yield Problem(
            "fingerprint", name, RECORD_NAME, f"its payload has {found}, it is {record.fingerprint}"
        )
    covered: Mapping[str, Any] = payload.get("inputs", {})
    for reference in record.inputs:
        if (digest := covered.get(reference.role)) != reference.digest:
            taken = "without it" if digest is None else f"over {digest}"
            message = (
                f"its input {reference.role} has digest {reference.digest}, its fingerprint was taken {taken}"
            )
            yield Problem("fingerprint", name, RECORD_NAME, message)
    seed = record.recipe.get("seed", record.seed)
    if record.seed is not None and seed != record.seed:
        yield Problem("fingerprint", name, RECORD_NAME, f"its seed is {record.seed}, its recipe has {seed}")


def _content_digest(manifest: bytes) -> str | None:
    try:
        return sha256_json(without_volatile(json.loads(manifest)))
    except (ValueError, RecursionError, UnstableValueError):
        return None


def _plain(package: str) -> str:
    return re.sub(r"[-_.]+", "-", package).lower()
