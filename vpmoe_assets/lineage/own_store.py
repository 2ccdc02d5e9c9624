"""A store of its own for making one artifact again: its inputs as they were, its sources, its experiment.

The inputs stand in it under their own records, as links to where they lie: nothing is copied, and nothing
about a published file is changed, not even its count of names. An input that is no longer there under its
version is taken from the ledger's copy of its record and from any artifact with the same content.
"""

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from vpmoe_assets.lineage.errors import ArtifactDamaged, ArtifactMissing, LineageError, RecordError
from vpmoe_assets.lineage.integrity import payload_problems
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.linking import link_tree
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, InputRef, Record
from vpmoe_assets.lineage.statements import DIRECTORY as STATEMENTS
from vpmoe_assets.lineage.store import Store

_UNFINISHED = ".unfinished"
_EXPERIMENT = "experiment.toml"
_LOG = "rerun.log"
_HOME = ".dagster"
_INSTANCE = "telemetry: {enabled: false}\nnux: {enabled: false}\npython_logs: {python_log_level: INFO}\n"


@dataclass(frozen=True)
class OwnStore:
    """Where an artifact is made again.

    Attributes:
        root: Of the store.
        resumed: Whether an interrupted attempt is gone on with.
    """

    root: Path
    resumed: bool

    @property
    def store(self) -> Store:
        """The store."""
        return Store(self.root)

    @property
    def objects(self) -> ObjectStore:
        """Its objects."""
        return ObjectStore(self.root)

    @property
    def experiment(self) -> Path:
        """The experiment's TOML."""
        return self.root / _EXPERIMENT

    @property
    def log(self) -> Path:
        """What the run prints."""
        return self.root / _LOG

    @property
    def home(self) -> Path:
        """Of a Dagster instance of its own."""
        return self.root / _HOME

    @classmethod
    def at(cls, root: Path) -> "OwnStore":
        """Take a directory for one; what a finished attempt left in it is removed.

        Raises:
            LineageError: Something else is there.
        """
        resumed = (root / _UNFINISHED).is_file()
        if root.exists() and not resumed:
            if not (root / _EXPERIMENT).is_file() and any(root.iterdir()):
                raise LineageError(f"{root} holds other things; give a directory that is empty, or none yet")
            shutil.rmtree(root)
        root.mkdir(parents=True, exist_ok=True)
        (root / _UNFINISHED).touch()
        own = cls(root, resumed)
        own.home.mkdir(exist_ok=True)
        (own.home / "dagster.yaml").write_text(_INSTANCE, encoding="ascii")
        return own

    def finish(self) -> None:
        """State that the attempt has come to its end: the next one begins anew."""
        (self.root / _UNFINISHED).unlink(missing_ok=True)

    def remove(self) -> None:
        """Remove it; what it links to stays."""
        shutil.rmtree(self.root)

    def take_inputs(self, store: Store, record: Record, log: Callable[[str], None]) -> None:
        """Put what an artifact was made from into it.

        Args:
            store: Where the inputs are.
            record: Of what is made again.
            log: Told what stands in for an input that is gone.

        Raises:
            LineageError: An input is gone, or not what it was; names it.
        """
        for reference in record.inputs:
            self._take(store, record.experiment, reference, log)

    def _take(self, store: Store, experiment: str, reference: InputRef, log: Callable[[str], None]) -> None:
        target = self.root / experiment / reference.asset / reference.version
        if target.is_symlink() or target.exists():
            return
        target.parent.mkdir(parents=True, exist_ok=True)
        name = f"{reference.asset}@{reference.version}"
        place = store.version_directory(experiment, reference.asset, reference.version)
        try:
            there = store.find(experiment, reference.asset, reference.version)
        except RecordError as error:
            raise ArtifactDamaged(f"its input {name} is damaged: {error}") from error
        if there is not None and there.digest == reference.digest:
            _require_intact(store, there, place, name)
            target.symlink_to(place.resolve(), target_is_directory=True)
        else:
            self._stand_in(store, experiment, reference, target, log)
        digest = reference.record_digest if there is None else there.record_digest
        said = Path(STATEMENTS, experiment, reference.asset, f"{digest}.jsonl")
        if (store.root / said).is_file():
            (self.root / said).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(store.root / said, self.root / said)

    def _stand_in(
        self,
        store: Store,
        experiment: str,
        reference: InputRef,
        target: Path,
        log: Callable[[str], None],
    ) -> None:
        name = f"{reference.asset}@{reference.version}"
        record = store.ledger.get(reference.record_digest)
        same = [
            head
            for head in store.heads()
            if head.digest == reference.digest and head.asset == reference.asset
        ]
        if record is None or not same:
            raise ArtifactMissing(
                f"its input {experiment}/{name} (digest {reference.digest[:12]}) is no longer in "
                f"{store.root}; materialise it again, and it is restored under its version"
            )
        source = store.directory(same[0])
        _require_intact(store, record, source, name)
        target.mkdir()
        link_tree(source / "payload", target / "payload")
        if (source / MANIFEST_NAME).is_file() and record.manifest is not None:
            shutil.copyfile(store.ledger.manifest(record.manifest.sha256), target / MANIFEST_NAME)
        shutil.copyfile(store.ledger.path(reference.record_digest), target / RECORD_NAME)
        log(f"input {name} is gone; {version_name(same[0])}, which has the same content, stands in for it")


def _require_intact(store: Store, record: Record, place: Path, name: str) -> None:
    if problems := payload_problems(place, record, store.hasher):
        raise ArtifactDamaged(
            f"its input {name} is damaged: {problems[0].path} {problems[0].message}; materialise it again"
        )
