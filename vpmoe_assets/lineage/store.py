"""The store: where artifacts lie, how one is published, and which may be built on.

::

    artifacts/<experiment>/<asset>/<version>/
        payload/          what is hashed and delivered
        manifest.json     where the format has one
        run/              logs, metrics, resume checkpoints
        .artifact.json    the record, written last

A version is `<UTC date>.<n>-<first 8 digits of the content digest>`. A directory without a record does
not exist for anyone: it is being published by a process that holds the asset's lock, or its publisher was
killed, and then the next attempt at the same recipe takes its files back. Published files lose their write
permission; directories keep theirs, so that a version can still be removed with `rm -r`.
"""

import contextlib
import json
import logging
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.files import replace_bytes, sync
from vpmoe_assets.lineage import locks, workarea
from vpmoe_assets.lineage.changes import Changes
from vpmoe_assets.lineage.digest import file_sha256, merkle_root, scan_tree
from vpmoe_assets.lineage.errors import (
    ArtifactBlocked,
    ArtifactDamaged,
    ArtifactMissing,
    PublishError,
    RecordError,
    SecretFoundError,
)
from vpmoe_assets.lineage.hashcache import HashCache
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.record import (
    MANIFEST_NAME,
    RECORD_NAME,
    Draft,
    ManifestRef,
    Record,
    read_record,
    record_bytes,
    safe_name,
)
from vpmoe_assets.lineage.redaction import (
    find_credential,
    redact,
    redact_command,
    redact_files,
    secret_values,
)
from vpmoe_assets.lineage.standing import Finding, findings, refusal
from vpmoe_assets.lineage.statements import Statements
from vpmoe_assets.lineage.volatile import without_volatile
from vpmoe_assets.lineage.workarea import WorkArea

_VERSION = re.compile(r"(\d{8})\.(\d+)-[0-9a-f]{8}")
_LOCK_WAIT_S = 60.0

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Damaged:
    """A version whose record cannot be read."""

    experiment: str
    asset: str
    version: str
    error: RecordError


class Store:
    """All artifacts below one directory.

    Args:
        root: The directory; made when first needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.statements = Statements(self.root)
        self._changes = Changes(self.root)
        self._hasher = HashCache(self.root / ".work" / "digests.sqlite")

    @property
    def hasher(self) -> HashCache:
        """The digests of published files, read only where something about a file has changed."""
        return self._hasher

    # Where things are.

    def directory(self, record: Record) -> Path:
        """Return the directory of a published version."""
        return self.version_directory(record.experiment, record.asset, record.version)

    def version_directory(self, experiment: str, asset: str, version: str) -> Path:
        """Return where a version lies, whether it exists or not."""
        return self.root / safe_name(experiment) / safe_name(asset) / safe_name(version)

    def payload(self, record: Record) -> Path:
        """Return the payload directory of a published version."""
        return self.directory(record) / "payload"

    def experiments(self) -> list[str]:
        """Return the experiments that have artifacts."""
        return _directories(self.root)

    def assets(self, experiment: str) -> list[str]:
        """Return the assets that have a directory in an experiment."""
        return _directories(self.root / safe_name(experiment))

    # What there is.

    def scan(self, experiment: str, asset: str) -> tuple[list[Record], list[Damaged]]:
        """Return every version of an asset, by sequence, and those whose record cannot be read, by name."""
        records: list[Record] = []
        damaged: list[Damaged] = []
        parent = self.root / safe_name(experiment) / safe_name(asset)
        for version in _directories(parent):
            path = parent / version / RECORD_NAME
            try:
                record = read_record(path)
                if (record.experiment, record.asset, record.version) != (experiment, asset, version):
                    raise RecordError(
                        f"{path}: is the record of {record.experiment}/{record.asset}/{record.version}"
                    )
                records.append(record)
            except FileNotFoundError:
                continue
            except RecordError as error:
                damaged.append(Damaged(experiment, asset, version, error))
        return sorted(records, key=lambda record: record.sequence), damaged

    def versions(self, experiment: str, asset: str) -> list[str]:
        """Return the readable versions of an asset, oldest first."""
        return [record.version for record in self.scan(experiment, asset)[0]]

    def records(self, experiment: str | None = None) -> Iterator[Record]:
        """Yield every readable record of one experiment, or of all, ordered by asset and sequence."""
        for name in [experiment] if experiment else self.experiments():
            for asset in self.assets(name):
                yield from self.scan(name, asset)[0]

    def damaged(self, experiment: str | None = None) -> Iterator[Damaged]:
        """Yield every version whose record cannot be read."""
        for name in [experiment] if experiment else self.experiments():
            for asset in self.assets(name):
                yield from self.scan(name, asset)[1]

    def latest(self, experiment: str, asset: str) -> Record | None:
        """Return the version with the highest sequence number, or None.

        Raises:
            RecordError: A version that may be newer has an unreadable record; falling back to an older one
                without a word would be worse than stopping.
        """
        records, damaged = self.scan(experiment, asset)
        newest = records[-1] if records else None
        for candidate in damaged:
            if newest is None or _order(candidate.version) > _order(newest.version):
                raise candidate.error
        return newest

    def find(self, experiment: str, asset: str, version: str | None) -> Record | None:
        """Return one version of an asset (the latest if none is named), or None; files are not looked at.

        Raises:
            RecordError: Its record is unreadable.
        """
        if version is None:
            return self.latest(experiment, asset)
        records, damaged = self.scan(experiment, asset)
        for broken in damaged:
            if broken.version == version:
                raise broken.error
        return next((record for record in records if record.version == version), None)

    def require(self, experiment: str, asset: str, version: str | None = None) -> Record:
        """Return the latest (or the given) version of an asset that something is to be built on.

        Raises:
            ArtifactMissing: There is none.
            ArtifactDamaged: Its record, payload or manifest is not what was published; names each file.
            ArtifactBlocked: One of its blocking checks did not pass.
        """
        name = f"{experiment}/{asset}" + (f"@{version}" if version else "")
        try:
            record = self.find(experiment, asset, version)
        except RecordError as error:
            raise ArtifactDamaged(f"{name} is damaged: {error}") from error
        if record is None:
            known = f"; versions: {', '.join(self.versions(experiment, asset)) or 'none'}" if version else ""
            raise ArtifactMissing(
                f"{name} has not been published in {self.root}{known}; materialise it first"
            )
        if problems := payload_problems(self.directory(record), record, self._hasher):
            listed = "; ".join(map(str, problems[:5]))
            more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
            raise ArtifactDamaged(
                f"{name} is damaged: {listed}{more}. Remove {self.directory(record)} and materialise it again"
            )
        if failed := self.blocked_by(record):
            raise ArtifactBlocked(
                f"{name} (version {record.version}) is blocked by its checks: {refusal(failed, asset)}"
            )
        return record

    def findings(self, record: Record) -> tuple[Finding, ...]:
        """Return the last word on each check of a version."""
        return findings(record, self.statements.about(record))

    def blocked_by(self, record: Record) -> tuple[Finding, ...]:
        """Return what keeps others from building on a version: checks that failed, or never spoke."""
        return tuple(finding for finding in self.findings(record) if finding.blocks)

    def reusable(self, experiment: str, asset: str, fingerprint: str) -> Record | None:
        """Return the newest version with this fingerprint that is intact, or None; blocked or not."""
        for record in reversed(self.scan(experiment, asset)[0]):
            if record.fingerprint != fingerprint:
                continue
            if self.intact(record):
                return record
        return None

    def intact(self, record: Record) -> bool:
        """Whether the files of a version are what was published."""
        return not payload_problems(self.directory(record), record, self._hasher)

    # Making one.

    @contextlib.contextmanager
    def work_area(
        self, experiment: str, asset: str, fingerprint: str, wait_s: float = _LOCK_WAIT_S
    ) -> Iterator[WorkArea]:
        """Hold the work area of one recipe; what an earlier, killed attempt left in it is still there.

        Two processes may ask for the same recipe at once: the second waits. Ask `reusable` again inside
        the block, since the other may have published meanwhile.

        Args:
            experiment: Name.
            asset: Name.
            fingerprint: 64 hex digits.
            wait_s: How long to wait for another holder, in seconds.

        Raises:
            BusyError: Another process still holds it; says which.
        """
        parent = self.root / ".work" / safe_name(experiment)
        name = f"{safe_name(asset)}-{fingerprint[:8]}"
        with locks.hold(parent / ".locks" / f"{name}.lock", f"the work area {experiment}/{name}", wait_s):
            area = WorkArea(parent / name, experiment, asset, fingerprint)
            with self._asset_lock(experiment, asset):
                for abandoned in self._abandoned(area):
                    area.reclaim(abandoned)
            area.unstage()
            area.prepare()
            try:
                yield area
            finally:
                area.open = False
                if area.path.exists() and area.is_empty():
                    area.remove()

    def publish(self, work: WorkArea, draft: Draft) -> Record:
        """Publish a finished work area: all of it, or nothing.

        Files are fsynced and hashed, the version is named under the asset's lock, the directory is renamed
        into place, and the record comes last. After an error everything is back in the work area; after a
        kill the next `work_area` of the same recipe puts it back. On success the work area is gone.

        Returns:
            The record as written. Credentials are removed from every text that is not part of the identity,
            And from the logs and other text files of `run/`.

        Raises:
            PublishError: The work area is not open, has no payload, or the draft contradicts it.
            SecretFoundError: The recipe itself holds a credential.
            UnsafePathError: The payload holds a link out of its tree, a device, or a name that is not UTF-8.
        """
        if not work.open:
            raise PublishError(f"{work.path}: publish inside the work_area block, while its lock is held")
        draft = _checked(work, draft)
        try:
            staged = work.stage()
            for name in redact_files(staged / "run", work.scratch):
                _log.warning("%s/%s: a credential was removed from run/%s", work.experiment, work.asset, name)
            record = self._publish_staged(work, staged, draft)
        except Exception:
            with self._asset_lock(work.experiment, work.asset):
                for abandoned in self._abandoned(work):
                    work.reclaim(abandoned)
            work.unstage()
            raise
        work.open = False
        work.remove()
        return record

    def _publish_staged(self, work: WorkArea, staged: Path, draft: Draft) -> Record:
        workarea.make_read_only(staged)
        files = scan_tree(staged / "payload", _sync_and_hash)
        run_files = scan_tree(staged / "run", _sync_and_hash)
        manifest = _manifest(staged / MANIFEST_NAME)
        for directory, _, _ in os.walk(staged):
            sync(Path(directory))
        with self._asset_lock(work.experiment, work.asset):
            digest = merkle_root(files)
            version, sequence, now = self._allot(work.experiment, work.asset, digest)
            record = Record.model_validate(
                {
                    **draft.model_dump(),
                    "experiment": work.experiment,
                    "asset": work.asset,
                    "version": version,
                    "sequence": sequence,
                    "published_utc": now,
                    "fingerprint": work.fingerprint,
                    "digest": digest,
                    "files": files,
                    "run_files": run_files,
                    "manifest": manifest,
                }
            )
            replace_bytes(staged / workarea.PENDING_NAME, record_bytes(record))
            (staged / workarea.PENDING_NAME).chmod(0o444)
            final = self.directory(record)
            final.parent.mkdir(parents=True, exist_ok=True)
            with self._changes.noted(f"{record.experiment}/{record.asset}/{record.version}"):
                staged.rename(final)
                sync(final.parent)
                (final / workarea.PENDING_NAME).rename(final / RECORD_NAME)
                sync(final)
        return record

    def _allot(self, experiment: str, asset: str, digest: str) -> tuple[str, int, str]:
        """Return version, sequence and time of the next publication; called under the asset's lock."""
        now = datetime.now(UTC)
        day = f"{now:%Y%m%d}"
        present = _directories(self.root / experiment / asset)
        taken = [int(match[2]) for name in present if (match := _VERSION.fullmatch(name)) and match[1] == day]
        records, _ = self.scan(experiment, asset)
        sequence = max([len(present), *(record.sequence for record in records)]) + 1
        return (
            f"{day}.{max(taken, default=0) + 1}-{digest[:8]}",
            sequence,
            now.isoformat(timespec="milliseconds"),
        )

    def _asset_lock(self, experiment: str, asset: str) -> contextlib.AbstractContextManager[None]:
        path = self.root / ".work" / experiment / ".locks" / f"{asset}.lock"
        return locks.hold(path, f"publishing of {experiment}/{asset}", _LOCK_WAIT_S)

    def _abandoned(self, work: WorkArea) -> Iterator[Path]:
        """Yield version directories of this recipe whose publisher was killed before it wrote the record."""
        parent = self.root / work.experiment / work.asset
        for version in _directories(parent):
            directory = parent / version
            if (directory / RECORD_NAME).exists():
                continue
            try:
                pending = json.loads((directory / workarea.PENDING_NAME).read_bytes())
            except (OSError, ValueError):
                continue
            if isinstance(pending, dict) and pending.get("fingerprint") == work.fingerprint:
                yield directory


def _checked(work: WorkArea, draft: Draft) -> Draft:
    """Return the draft without secrets, after comparing it with the work area it claims to describe."""
    if sha256_json(draft.fingerprint_payload) != work.fingerprint:
        raise PublishError(
            f"{work.experiment}/{work.asset}: the draft's fingerprint payload hashes to "
            f"{sha256_json(draft.fingerprint_payload)}, the work area is of {work.fingerprint}"
        )
    fingerprinted = set(draft.fingerprint_payload.get("inputs", {}).values())
    for reference in draft.inputs:
        if reference.digest not in fingerprinted:
            raise PublishError(
                f"{work.experiment}/{work.asset}: input {reference.asset}@{reference.version} (digest "
                f"{reference.digest}) is not among the inputs of the recipe fingerprint"
            )
    secrets = secret_values()
    if where := find_credential(draft.fingerprint_payload, secrets):
        raise SecretFoundError(
            f"{work.experiment}/{work.asset}: the recipe holds a credential at {where}; pass credentials "
            "in environment variables, never in an experiment's TOML"
        )
    fields: dict[str, Any] = draft.model_dump()
    kept = {"fingerprint_payload", "code", "inputs", "command"}
    safe = {key: value if key in kept else redact(value, secrets) for key, value in fields.items()}
    return Draft.model_validate({**safe, "command": redact_command(draft.command, secrets)})


def _manifest(path: Path) -> ManifestRef | None:
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_bytes())
    except ValueError as error:
        raise PublishError(f"{path.name} is not JSON: {error}") from error
    return ManifestRef(
        size=path.stat().st_size,
        sha256=_sync_and_hash(path),
        content_sha256=sha256_json(without_volatile(content)),
    )


def _sync_and_hash(path: Path) -> str:
    with path.open("rb") as file:
        os.fsync(file.fileno())
    return file_sha256(path)


def _directories(parent: Path) -> list[str]:
    try:
        with os.scandir(parent) as entries:
            return sorted(
                entry.name for entry in entries if entry.is_dir() and not entry.name.startswith(".")
            )
    except FileNotFoundError:
        return []


def _order(version: str) -> tuple[str, int]:
    match = _VERSION.fullmatch(version)
    return (match[1], int(match[2])) if match else ("", 0)
