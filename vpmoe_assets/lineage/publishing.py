"""From a work area to a published version: sealed, hashed, named, recorded, put into its place.

A version that is made again after it was lost is restored under its own record. One whose files are there
already, in another experiment or under an earlier version, is published with those files, linked.
"""

import contextlib
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.files import sync
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.counters import Counters
from vpmoe_assets.lineage.digest import FileEntry, file_sha256, merkle_root, scan_tree
from vpmoe_assets.lineage.drafting import checked
from vpmoe_assets.lineage.errors import ArtifactDamaged, PublishError
from vpmoe_assets.lineage.filememory import Identity, identity
from vpmoe_assets.lineage.hashcache import HashCache
from vpmoe_assets.lineage.headcache import Heads
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.layout import Layout, version_order
from vpmoe_assets.lineage.linking import link_file, link_tree
from vpmoe_assets.lineage.placing import Placement, Places
from vpmoe_assets.lineage.record import (
    MANIFEST_NAME,
    RECORD_NAME,
    Draft,
    ManifestRef,
    Record,
    record_bytes,
    safe_name,
)
from vpmoe_assets.lineage.redaction import redact_files, refuse_in_content
from vpmoe_assets.lineage.restoring import Content, Restorer
from vpmoe_assets.lineage.sealing import seal, write_sealed
from vpmoe_assets.lineage.volatile import without_volatile
from vpmoe_assets.lineage.workarea import WorkArea

_log = logging.getLogger(__name__)


_LOCK_WAIT_S = 60.0

_Hashed = tuple[Path, Identity, str]
"""A file, what it was known by before it was hashed, and its sha256."""


@dataclass(frozen=True, slots=True)
class _Files:
    """What is in a directory of the published layout."""

    payload: Sequence[FileEntry]
    run: Sequence[FileEntry]
    manifest: ManifestRef | None

    def content(self, directory: Path) -> Content:
        manifest = None if self.manifest is None else self.manifest.content_sha256
        return Content(directory, merkle_root(self.payload), manifest, self.run)


@dataclass(frozen=True, slots=True)
class _Ready:
    """A finished version in the work area.

    Attributes:
        record: Its record, which lies in it.
        directory: Of the published layout.
        restored: Body of the statement that its files were made again; None for a new version.
    """

    record: Record
    directory: Path
    restored: Mapping[str, Any] | None = None


class Publisher:
    """Publishes into a store.

    Args:
        layout: Of the store.
        places: Of the store.
        restorer: Of the store.
        heads: Of the store.
        hasher: Digests of published files.
    """

    def __init__(
        self, layout: Layout, places: Places, restorer: Restorer, heads: Heads, hasher: HashCache
    ) -> None:
        self._layout = layout
        self._places = places
        self._restorer = restorer
        self._heads = heads
        self._hasher = hasher
        self._counters = Counters(layout, heads)

    @contextlib.contextmanager
    def work_area(
        self, experiment: str, asset: str, fingerprint: str, wait_s: float | None
    ) -> Iterator[WorkArea]:
        """Hold a work area; see `vpmoe_assets.lineage.store.Store.work_area`."""
        parent = self._layout.work / safe_name(experiment)
        name = f"{safe_name(asset)}-{fingerprint[:8]}"
        wait_s = _LOCK_WAIT_S if wait_s is None else wait_s
        with locks.hold(parent / ".locks" / f"{name}.lock", f"the work area {experiment}/{name}", wait_s):
            # After the area's own lock: a clean-up holds this one and looks whether any area is at work.
            locks.wait_until_free(self._layout.collecting, "a clean-up of the store", wait_s)
            area = WorkArea(parent / name, experiment, asset, fingerprint)
            if self._places.decided(area):
                area.require_owner()
                with self._layout.asset_lock(experiment, asset):
                    self._placed(area)
                area.open = True
            area.unstage()
            area.prepare()
            try:
                yield area
            finally:
                area.open = False
                if area.path.exists() and area.is_empty():
                    area.remove()

    def publish(self, work: WorkArea, draft: Draft) -> Record:
        """Publish what was made in a work area; see `vpmoe_assets.lineage.store.Store.publish`."""
        _require_open(work)
        draft = checked(work, draft)
        if self._places.decided(work):  # an attempt in this block failed after the point of no return
            with self._layout.asset_lock(work.experiment, work.asset):
                return self._placed(work)[-1]
        try:
            staged = work.stage()
            refuse_in_content(staged, f"{work.experiment}/{work.asset}")
            changed, removed = redact_files(staged / "run", work.scratch)
            for name in changed:
                _log.warning("%s/%s: a credential was removed from run/%s", work.experiment, work.asset, name)
            for name in removed:
                _log.warning("%s/%s: run/%s left out: it holds a secret", work.experiment, work.asset, name)
            seal(staged)
            files, hashed = _hashed(staged)
            content = files.content(staged)
            lost = self._restorer.lost(work.experiment, work.asset, work.fingerprint, content, collected=True)
            ready = self._restored(work, lost, content, draft.dagster_run_id)
            with self._layout.asset_lock(work.experiment, work.asset):
                if not ready or not self._is_latest(ready[-1].record, ready):
                    ready.append(self._new(work, staged, draft, files))
                record = self._place(work, ready)[-1]
        except Exception:
            if not self._places.decided(work):
                work.unstage()
            raise
        self._hasher.learn(_moved(hashed, self._layout.directory(record)))
        return record

    def link(self, work: WorkArea, original: Record, draft: Callable[[], Draft], run: str | None) -> Record:
        """Make published files the latest version of the work area's asset.

        Args:
            work: The open work area of their fingerprint; what is left in it is obsolete, and removed.
            original: Intact; of the same asset in any experiment.
            draft: Returns what its record says, where one of its own is needed.
            run: Id of the Dagster run in which this happens.
        """
        _require_open(work)
        source = self._layout.directory(original)
        files = _Files(original.files, original.run_files, original.manifest)
        lost = self._restorer.lost(
            work.experiment, work.asset, work.fingerprint, files.content(source), collected=False
        )
        own = (original.experiment, original.asset) == (work.experiment, work.asset)
        if own and not lost and self._is_latest(original, ()):
            return _done(work, original)
        evidence, _ = self._restorer.evidence(original.run_files, source / "run")
        files = replace(files, run=[entry for entry in original.run_files if entry.path in evidence])
        ready = self._restored(work, lost, files.content(source), run)
        there = [*([original] if own else []), *(each.record for each in ready)]
        newest = max(there, key=lambda record: record.sequence, default=None)
        with self._layout.asset_lock(work.experiment, work.asset):
            if newest is not None and self._is_latest(newest, ready):
                if ready:
                    self._place(work, ready)
                return _done(work, newest)
        target = work.prepared / "new"
        hashed = self._linked(original, source, evidence, target)
        with self._layout.asset_lock(work.experiment, work.asset):
            ready.append(self._new(work, target, checked(work, draft()), files))
            record = self._place(work, ready)[-1]
        self._hasher.learn(_renamed(hashed, source, self._layout.directory(record)))
        return record

    # Parts of both.

    def _restored(
        self, work: WorkArea, lost: Sequence[Record], content: Content, run: str | None
    ) -> list[_Ready]:
        """Prepare what was lost of this content; what cannot be restored is left out."""
        shutil.rmtree(work.prepared, ignore_errors=True)
        ready: list[_Ready] = []
        for record in lost:
            target = work.prepared / record.version
            body = self._restorer.prepare(record, content, target, run)
            if body is not None:
                ready.append(_Ready(record, target, body))
        return ready

    def _is_latest(self, candidate: Record, ready: Sequence[_Ready]) -> bool:
        """Whether a version is the latest one as soon as what is ready is in its place."""
        heads, damaged = self._heads.of_asset(candidate.experiment, candidate.asset)
        restored = {each.record.version for each in ready}
        newer = [head.version for head in heads if head.sequence > candidate.sequence]
        order = version_order(candidate.version)
        newer += [bad.version for bad in damaged if version_order(bad.version) > order]
        return set(newer) <= restored

    def _linked(
        self, original: Record, source: Path, evidence: Mapping[str, Path], target: Path
    ) -> list[_Hashed]:
        """Make a directory of the files of a published one, sealed; return what they were known by."""
        if problems := payload_problems(source, original, self._hasher):
            raise ArtifactDamaged(f"{source} is damaged: {problems[0]}")
        names = [Path("payload", entry.path) for entry in original.files]
        hashed = [
            (name, identity((source / name).stat()), entry.sha256)
            for name, entry in zip(names, original.files, strict=True)
        ]
        link_tree(source / "payload", target / "payload")
        (target / "run").mkdir()
        for name, path in evidence.items():
            link_file(path, target / "run" / name)
        if original.manifest is not None:
            link_file(source / MANIFEST_NAME, target / MANIFEST_NAME)
        seal(target)
        return hashed

    def _new(self, work: WorkArea, directory: Path, draft: Draft, files: _Files) -> _Ready:
        """Name a new version and write its record, the last of its files."""
        digest = merkle_root(files.payload)
        next_one = self._counters.allot(work.experiment, work.asset)
        record = Record.model_validate(
            {
                **draft.model_dump(),
                "experiment": work.experiment,
                "asset": work.asset,
                "version": f"{next_one.day}.{next_one.number}-{digest[:8]}",
                "sequence": next_one.sequence,
                "published_utc": next_one.time,
                "fingerprint": work.fingerprint,
                "digest": digest,
                "files": files.payload,
                "run_files": files.run,
                "manifest": files.manifest,
            }
        )
        write_sealed(directory / RECORD_NAME, record_bytes(record))
        return _Ready(record, directory)

    def _place(self, work: WorkArea, ready: Sequence[_Ready]) -> list[Record]:
        """Put finished versions into their place; the work area is gone then."""
        for each in ready:
            for directory, _, _ in os.walk(each.directory):
                sync(Path(directory))
            sync(each.directory.parent)
        self._places.decide(
            work,
            [
                Placement(
                    each.directory.relative_to(work.path).as_posix(), each.record.record_digest, each.restored
                )
                for each in ready
            ],
        )
        return self._placed(work)

    def _placed(self, work: WorkArea) -> list[Record]:
        records = self._places.complete(work)
        self._counters.settle(work.experiment, work.asset)
        for record in records:
            self._heads.learn(record)
        _done(work, records[-1])
        return records


def _require_open(work: WorkArea) -> None:
    if not work.open:
        raise PublishError(f"{work.path}: publish inside the work_area block, while its lock is held")


def _done(work: WorkArea, record: Record) -> Record:
    """Close and remove a work area: what it was for is published."""
    work.open = False
    work.remove()
    return record


def _hashed(staged: Path) -> tuple[_Files, list[_Hashed]]:
    """Bring every file to the disk and hash it; return what they were known by then, too."""
    known: dict[Path, tuple[Identity, str]] = {}

    def hasher(path: Path) -> str:
        with path.open("rb") as file:
            os.fsync(file.fileno())
            before = identity(os.fstat(file.fileno()))
        known[path] = before, (digest := file_sha256(path))
        return digest

    payload, run = scan_tree(staged / "payload", hasher), scan_tree(staged / "run", hasher)
    files = _Files(payload, run, _manifest(staged / MANIFEST_NAME, hasher))
    top = Path(os.path.realpath(staged))
    return files, [(path.relative_to(top), *rest) for path, rest in known.items() if path.is_relative_to(top)]


def _moved(hashed: Sequence[_Hashed], directory: Path) -> list[_Hashed]:
    """Return what was hashed under the paths that it has now."""
    top = Path(os.path.realpath(directory))
    return [(top / path, known, digest) for path, known, digest in hashed if (top / path).is_file()]


def _renamed(hashed: Sequence[_Hashed], source: Path, target: Path) -> list[_Hashed]:
    """Return what was hashed under both its names: the second changed its ctime, and nothing else."""
    now: list[_Hashed] = []
    for path, before, digest in hashed:
        for directory in (source, target):
            name = Path(os.path.realpath(directory)) / path
            known = identity(name.stat())
            if known[:4] == before[:4]:
                now.append((name, known, digest))
    return now


def _manifest(path: Path, hasher: Callable[[Path], str]) -> ManifestRef | None:
    if not path.exists():
        return None
    try:
        content = parse_json(path.read_bytes())
    except ValueError as error:
        raise PublishError(f"{path.name} is not JSON: {error}") from error
    return ManifestRef(
        size=path.stat().st_size, sha256=hasher(path), content_sha256=sha256_json(without_volatile(content))
    )
