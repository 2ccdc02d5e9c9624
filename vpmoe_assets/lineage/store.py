"""The store: which artifacts there are, which may be built on, and the doors by which one gets in.

See `vpmoe_assets.lineage.layout` for where things lie. A directory without a record does not exist for
anyone. Published files have no write permission; directories keep theirs, so that a version can still be
removed with `rm -r`.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

from vpmoe_assets.lineage.errors import ArtifactBlocked, ArtifactDamaged, ArtifactMissing, RecordError
from vpmoe_assets.lineage.hashcache import HashCache
from vpmoe_assets.lineage.headcache import Heads
from vpmoe_assets.lineage.heads import Damaged, Head, Versions, newest
from vpmoe_assets.lineage.intact import IntactStates
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.layout import Layout, Versioned, directories
from vpmoe_assets.lineage.ledger import Ledger
from vpmoe_assets.lineage.placing import Places
from vpmoe_assets.lineage.publishing import Publisher
from vpmoe_assets.lineage.readings import Readings
from vpmoe_assets.lineage.record import (
    RECORD_NAME,
    Draft,
    InputRef,
    Record,
    read_record,
    safe_name,
)
from vpmoe_assets.lineage.renewal import reissued, verdicts
from vpmoe_assets.lineage.restoring import Restorer
from vpmoe_assets.lineage.standing import Finding, findings, refusal
from vpmoe_assets.lineage.statements import Statements
from vpmoe_assets.lineage.workarea import WorkArea


class Store:
    """All artifacts below one directory.

    Args:
        root: The directory; made when first needed.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.statements = Statements(self.root)
        self.ledger = Ledger(self.root)
        self._layout = Layout(self.root)
        self._hasher = HashCache(self._layout.work / "digests.sqlite")
        self._heads = Heads(self._layout)
        self._restorer = Restorer(self._layout, self.ledger, self._heads, self.statements, self._hasher)
        places = Places(self._layout, self.ledger, self.statements)
        self._publisher = Publisher(self._layout, places, self._restorer, self._heads, self._hasher)

    @property
    def hasher(self) -> HashCache:
        """The digests of published files, read only where something about a file has changed."""
        return self._hasher

    def states(self, workers: int = 1) -> IntactStates:
        """Return the states in which published versions were found intact.

        Args:
            workers: Processes that look at many files; with more than one, the main module has to be one that
                may be imported.
        """
        return IntactStates(self._layout.work / "intact.sqlite", workers)

    @property
    def readings(self) -> Readings:
        """What the files of the ledger and of statements were found to say."""
        return Readings(self._layout.work / "readings.sqlite")

    # Where things are.

    def directory(self, named: Versioned) -> Path:
        """Return the directory of a published version."""
        return self._layout.directory(named)

    def version_directory(self, experiment: str, asset: str, version: str) -> Path:
        """Return where a version lies, whether it exists or not."""
        return self._layout.version(experiment, asset, version)

    def payload(self, named: Versioned) -> Path:
        """Return the payload directory of a published version."""
        return self.directory(named) / "payload"

    def experiments(self) -> list[str]:
        """Return the experiments that have artifacts."""
        return directories(self.root)

    def assets(self, experiment: str) -> list[str]:
        """Return the assets that have a directory in an experiment."""
        return directories(self.root / safe_name(experiment))

    # What there is.

    def scan(self, experiment: str, asset: str) -> tuple[Versions, list[Damaged]]:
        """Return every version of an asset, by sequence, and those whose record cannot be read, by name."""
        return self._heads.of_asset(experiment, asset)

    def versions(self, experiment: str, asset: str) -> list[str]:
        """Return the readable versions of an asset, oldest first."""
        return [head.version for head in self.scan(experiment, asset)[0]]

    def heads(self, experiment: str | None = None) -> Iterator[Head]:
        """Yield the head of every readable record of one experiment, or of all, by asset and sequence."""
        for name in [experiment] if experiment else self.experiments():
            for asset in self.assets(name):
                yield from self.scan(name, asset)[0]

    def records(self, experiment: str | None = None) -> Iterator[Record]:
        """Yield every readable record of one experiment, or of all, by asset and sequence; reads them all."""
        for head in self.heads(experiment):
            with contextlib.suppress(FileNotFoundError):  # removed meanwhile
                yield self.record(head)

    def read(
        self, experiment: str, asset: str, versions: Iterable[str]
    ) -> Iterator[tuple[str, Record | RecordError]]:
        """Yield the whole records of those versions that have one, or what is wrong with them."""
        parent = self._layout.asset(experiment, asset)
        for path, found in self._heads.records(parent / version / RECORD_NAME for version in versions):
            yield path.parent.name, found

    def rebuild_ledger(self) -> int:
        """Put every readable record into the ledger, and say how many were not in it: of an older store."""
        added = 0
        for head in self.heads():
            if not self.ledger.knows(head.record_digest, head.fingerprint, head.version):
                # Removed meanwhile; or its manifest is gone: damaged.
                with contextlib.suppress(FileNotFoundError):
                    self.ledger.put(self.record(head), self.directory(head))
                    added += 1
        return added

    def damaged(self, experiment: str | None = None) -> Iterator[Damaged]:
        """Yield every version whose record cannot be read."""
        for name in [experiment] if experiment else self.experiments():
            for asset in self.assets(name):
                yield from self.scan(name, asset)[1]

    def head(self, experiment: str, reference: InputRef) -> Head | None:
        """Return the head of an input of something, or None where it is gone, unreadable, or another one now.

        Args:
            experiment: Of what was made from it.
            reference: By which its record names it.
        """
        try:
            head = self._heads.of_version(experiment, reference.asset, reference.version)
        except RecordError:
            return None
        return head if head is not None and head.record_digest == reference.record_digest else None

    def remembered(self, record_digests: Iterable[str]) -> dict[str, Head]:
        """Return heads by record digest from the ledger, also of versions that are gone.

        What the ledger does not know, or knows altered, is left out.
        """
        paths = {self.ledger.path(digest): digest for digest in record_digests}
        heads, _ = self._heads.of_files(paths)
        return {paths[path]: head for path, head in heads.items() if head.record_digest == paths[path]}

    def head_of(self, experiment: str, asset: str, version: str) -> Head | None:
        """Return the head of a version, or None.

        Raises:
            RecordError: Its record is unreadable.
        """
        return self._heads.of_version(experiment, asset, version)

    def record(self, head: Head) -> Record:
        """Return the whole record of a head.

        Raises:
            FileNotFoundError: It was removed meanwhile.
            RecordError: It was altered meanwhile.
        """
        path = self._layout.record(head)
        record = read_record(path)
        if record.record_digest != head.record_digest:
            raise RecordError(f"{path}: another record (digest {record.record_digest}) than a moment ago")
        return record

    def latest(self, experiment: str, asset: str) -> Head | None:
        """Return the version with the highest sequence number, or None.

        Raises:
            RecordError: A version that may be newer has an unreadable record; falling back to an older one
                without a word would be worse than stopping.
        """
        return newest(*self.scan(experiment, asset))

    def find(self, experiment: str, asset: str, version: str | None = None) -> Record | None:
        """Return one version of an asset (the latest if none is named), or None; files are not looked at.

        Raises:
            RecordError: Its record is unreadable.
        """
        if version is None:
            head = self.latest(experiment, asset)
        else:
            head = self._heads.of_version(experiment, asset, version)
        return None if head is None else self.record(head)

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
                f"{name} is damaged: {listed}{more}. Materialise it again: where it comes out "
                "the same, it is restored in its place"
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

    def reusable(
        self,
        experiment: str,
        asset: str,
        fingerprint: str,
        suits: Callable[[Record], bool] | None = None,
    ) -> Record | None:
        """Return an intact version of an asset with this fingerprint, or None; blocked or not.

        Looked for first in the experiment, newest first, then in every other. The one that is returned may be
        of another experiment, be no longer the latest, or have lost its record's file: `renew` puts that
        right. Only the asset of the same name counts: its name is not in the fingerprint, yet its files may
        hold it, and its checks are its own.

        Args:
            experiment: Name.
            asset: Name.
            fingerprint: 64 hex digits.
            suits: What else is asked of a version; nothing by default.
        """

        def usable(record: Record) -> bool:
            return (suits is None or suits(record)) and self.intact(record)

        for head in reversed(self.scan(experiment, asset)[0]):
            if head.fingerprint == fingerprint:
                with contextlib.suppress(FileNotFoundError, RecordError):
                    if usable(record := self.record(head)):
                        return record
        elsewhere = []
        for record in self._restorer.known(None, asset, fingerprint):
            if record.experiment != experiment:
                elsewhere.append(record)
            elif usable(record):
                return record
        for record in elsewhere:
            with contextlib.suppress(RecordError):
                there = self._heads.of_version(record.experiment, asset, record.version)
                if there and there.record_digest == record.record_digest and usable(record):
                    return record
        return None

    def intact(self, record: Record) -> bool:
        """Whether the files of a version are what was published."""
        return not payload_problems(self.directory(record), record, self._hasher)

    # Making one.

    def work_area(
        self, experiment: str, asset: str, fingerprint: str, wait_s: float | None = None
    ) -> contextlib.AbstractContextManager[WorkArea]:
        """Hold the work area of one recipe; what an earlier, killed attempt left in it is still there.

        A publication that was cut short after its point of no return is completed first. Two processes may
        ask for the same recipe at once: the second waits. Ask `reusable` inside the block, since the other,
        or the completed publication, may be what is wanted.

        Args:
            experiment: Name.
            asset: Name.
            fingerprint: 64 hex digits.
            wait_s: How long to wait for another holder, in seconds; a minute by default.

        Raises:
            BusyError: Another process still holds it; says which.
        """
        return self._publisher.work_area(experiment, asset, fingerprint, wait_s)

    def publish(self, work: WorkArea, draft: Draft) -> Record:
        """Publish a finished work area: all of it, or nothing.

        Files are fsynced and hashed, the version is named under the asset's lock, the record goes into the
        ledger, and one rename makes the version visible. After an error or a kill everything is back in the
        work area, or, past the point of no return, is completed by the next `publish` or `work_area` of the
        same recipe. On success the work area is gone.

        Where the same content of the same recipe was published before, and that version was removed or
        damaged since, it is restored under its original record, with a statement `restored`.

        Returns:
            The record as written, or the one that was restored; the latest version of the asset. Credentials
            are removed from every text that is not part of the identity, and from the logs and other text
            files of `run/`.

        Raises:
            PublishError: The work area is not open, has no payload, or the draft contradicts it.
            SecretFoundError: The recipe itself holds a credential.
            UnsafePathError: The payload holds a link out of its tree, a device, or a name that is not UTF-8.
        """
        return self._publisher.publish(work, draft)

    def renew(
        self,
        work: WorkArea,
        record: Record,
        *,
        inputs: Sequence[InputRef],
        blocking_checks: Sequence[str],
        run: str | None,
    ) -> Record:
        """Return the latest version of the work area's asset with the content of `record`.

        That is `record` itself where it is the latest version here. Otherwise its files, linked and not
        copied, are published under a record that names it in `original`, with what was said of it by its
        checks: it is of another experiment, or a newer version was made with another recipe since. Other
        versions here that had the same content and were lost are restored. The work area is gone then.

        Args:
            work: The open work area of its fingerprint.
            record: As returned by `reusable`.
            inputs: What it is made from, as named here.
            blocking_checks: Of the asset, as the code has them now.
            run: Id of the Dagster run in which this happens.
        """
        renewed = self._publisher.link(work, record, lambda: reissued(record, inputs, blocking_checks), run)
        if renewed.record_digest != record.record_digest and not self.statements.about(renewed):
            for statement in verdicts(self.findings(record), renewed):
                self.statements.append(statement)
        return renewed
