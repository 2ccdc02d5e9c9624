"""What an asset's function gets and returns: published inputs, the build to fill, what it says of it."""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import dagster as dg
import orjson

from trainer.contract.attempts import Attempt
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.job import Part
from trainer.contract.status import METRICS_NAME, SUMMARY_NAME
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.lineage.kept import laid_out
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import CodeState, EvalScore, InputRef, Objects, PerfFigure, Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.workarea import WorkArea
from vpmoe_assets.resources.shards import ShardsResource
from vpmoe_assets.resources.trainer import TrainerResource, TrainerResult


class Evidence(dict[str, Any]):
    """What a job said of its deliverable; it may be of an earlier version, which did not say everything."""

    def __missing__(self, key: str) -> Any:
        raise EvidenceMissing(f"{SUMMARY_NAME} says nothing of {key}; it was measured by an earlier version")


@dataclass(frozen=True)
class Published:
    """An artifact in the store, as its consumers and its checks see it: immutable.

    Attributes:
        record: What is known of it.
        directory: Of the version.
        acceptance: Id of the statement by which a person accepted it as what other code makes, if one holds.
    """

    record: Record
    directory: Path
    acceptance: str | None = None

    @property
    def payload(self) -> Path:
        """The directory of what is hashed."""
        return self.directory / "payload"

    @property
    def run(self) -> Path:
        """The directory of how it came about; parts of it may have been cleaned away."""
        return self.directory / "run"

    @cached_property
    def manifest(self) -> dict[str, Any]:
        """The manifest beside the payload, parsed."""
        return dict(orjson.loads((self.directory / "manifest.json").read_bytes()))

    @cached_property
    def summary(self) -> Evidence:
        """What the job that made it said of its deliverable, as recorded.

        Raises:
            EvidenceMissing: It is no longer there, or no longer what was published.
        """
        return Evidence(orjson.loads(self._evidence(SUMMARY_NAME)))

    @cached_property
    def points(self) -> list[dict[str, Any]]:
        """What the job that made it logged, a line a step, as recorded.

        Raises:
            EvidenceMissing: It is no longer there, or no longer what was published.
        """
        return [orjson.loads(line) for line in self._evidence(METRICS_NAME).splitlines()]

    def _evidence(self, name: str) -> bytes:
        path = self.run / name
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            raise EvidenceMissing(f"{path} is no longer there") from None
        published = {entry.path: entry.sha256 for entry in self.record.run_files}.get(name)
        if hashlib.sha256(content).hexdigest() != published:
            raise EvidenceMissing(f"{path} is not what was published with the artifact")
        return content

    def as_input(self) -> InputRef:
        """Return the reference by which what is made of it names it; its role is the asset."""
        return self.record.as_input(acceptance=self.acceptance)


@dataclass(frozen=True)
class Build:
    """What an asset's function works with.

    Attributes:
        context: Dagster's, for logs and observations.
        work: The locked work area; it survives a crash, and the next build of the same fingerprint finds it.
        recipe: The resolved recipe.
        fingerprint: sha256 over recipe, sources and inputs.
        code: Git state of the sources.
        objects: What is kept of them and of the configuration, to repeat the step.
        loaded: Modules of the project that this process had loaded before.
    """

    context: dg.AssetExecutionContext
    experiment: Experiment
    store: Store
    work: WorkArea
    asset: str
    recipe: Mapping[str, Any]
    fingerprint: str
    code: CodeState
    objects: Objects
    environment: Mapping[str, Any]
    loaded: frozenset[str]
    _trainer: TrainerResource | None = None
    _shards: ShardsResource | None = None

    @property
    def payload(self) -> Path:
        """Directory to fill."""
        return self.work.payload

    @property
    def trainer(self) -> TrainerResource:
        """The resource that launches jobs; only for assets declared with `trains=True`."""
        if self._trainer is None:
            raise RuntimeError(f"asset {self.asset} launches no job: declare it with trains=True")
        return self._trainer

    @property
    def shards(self) -> ShardsResource:
        """The resource that says what runs shards; only for assets declared with `sharded=True`."""
        if self._shards is None:
            raise RuntimeError(f"asset {self.asset} has no shards: declare it with sharded=True")
        return self._shards

    def run_job(
        self,
        command: str,
        inputs: Mapping[str, Published],
        *,
        alone: bool = False,
        verify_resume: bool = True,
        parts: Mapping[str, Part] | None = None,
        execution: Mapping[str, Any] | None = None,
    ) -> TrainerResult:
        """Run a job of the trainer in the work area, from the sources as they were read.

        Args:
            command: Of the trainer.
            inputs: Of the job, by name.
            alone: In one process, whatever the layout of training runs is.
            verify_resume: At the end of a training run, repeat its last steps from their checkpoint.
            parts: Of an evaluation: identity and directories of each checkpoint's measurement.
            execution: Keys of the job's `execution` beside the resource's settings.
        """
        trainer = self.trainer.alone() if alone else self.trainer
        if self._shards is not None:
            trainer = self._shards.trainer(trainer)
        snapshot = self.objects.sources
        if snapshot is None:
            raise RuntimeError(f"asset {self.asset}: no sources were kept that a job could run from")
        return trainer.run(
            self.context,
            command=command,
            asset=self.asset,
            experiment=self.experiment.name,
            recipe=self.recipe,
            recipe_fingerprint=self.fingerprint,
            seed=self.experiment.seed,
            inputs={name: (item.payload, item.record.digest) for name, item in inputs.items()},
            provenance={
                "git_sha": self.code.git_sha,
                "git_dirty": self.code.git_dirty,
                "source_digest": self.code.source_digest,
                "lock_digest": self.environment["lock_digest"],
                "snapshot": snapshot,
            },
            sources=laid_out(ObjectStore(self.store.root), snapshot),
            work_dir=self.work.path,
            output_dir=self.work.output,
            verify_resume=verify_resume,
            parts=parts,
            execution=execution,
        )


@dataclass(frozen=True)
class Built:
    """What an asset's function says of the payload it filled.

    Attributes:
        metrics: Numbers for plots, views and the record.
        details: What the format adds to the record.
        execution: How it ran; never part of the identity.
        evals: Scores of the objects it measured.
        perf: Speeds and sizes that it measured.
        attempts: Every start of the job that filled it; none where no job did.
    """

    metrics: Mapping[str, bool | int | float | str | None] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    execution: Mapping[str, Any] = field(default_factory=dict)
    evals: Sequence[EvalScore] = ()
    perf: Sequence[PerfFigure] = ()
    attempts: Sequence[Attempt] = ()
