"""A Dagster step at work: its inputs required, its artifact reused or published, judged and indexed.

`produced_asset` is for an asset with a step of its own; a step that makes several goes by `Step` and `Making`
itself.
"""

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from typing import Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.check_results import check_results
from vpmoe_assets.assets.presentation import record_written
from vpmoe_assets.assets.step import Step
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks.judging import judge
from vpmoe_assets.codebase.loaded import loaded_modules, unexplained, witnessed
from vpmoe_assets.codebase.toolchain import toolchain_difference, toolchain_note
from vpmoe_assets.codebase.unchanged import SourcesChangedError, loaded_here, require_unchanged
from vpmoe_assets.events.metadata import record_metadata
from vpmoe_assets.lineage.acceptance import acceptances_of, accepted_version, settle_acceptances
from vpmoe_assets.lineage.adoption import is_adopted
from vpmoe_assets.lineage.kept import keep
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.provenance import code_of, environment
from vpmoe_assets.lineage.record import Attempt, Draft, Objects, Record, utc_now
from vpmoe_assets.lineage.remarks import Remark
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.workarea import WorkArea
from vpmoe_assets.resources.detached import RECORD_NAME as DETACHED
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.shards import ShardsResource
from vpmoe_assets.resources.told import VERSION_TAG
from vpmoe_assets.resources.trainer import TrainerResource
from vpmoe_assets.units import human_bytes


@dataclass(frozen=True)
class Making:
    """A Dagster step at work: where its inputs are found, and where what it makes goes."""

    experiment: Experiment
    context: dg.AssetExecutionContext
    store: Store
    index: IndexResource
    trainer: TrainerResource | None = None
    shards: ShardsResource | None = None

    def published(self, names: Iterable[str]) -> dict[str, Published]:
        """Return the latest artifact of each asset, verified, by name.

        Raises:
            LineageError: One is missing, damaged, or a blocking check of it failed.
        """
        return {name: self._published(self.store.require(self.experiment.name, name)) for name in names}

    def ever_published(self, asset: str) -> bool:
        """Whether any version of an asset is there."""
        return self.store.latest(self.experiment.name, asset) is not None

    def work_area(self, asset: str, fingerprint: str) -> AbstractContextManager[WorkArea]:
        """Hold the work area of a fingerprint."""
        return self.store.work_area(self.experiment.name, asset, fingerprint)

    def reused(
        self, step: Step, work: WorkArea, fingerprint: str, inputs: Mapping[str, Published]
    ) -> Published | None:
        """Return the artifact of this fingerprint, the latest one from now on, or None where there is none.

        One of another fingerprint counts where a person accepted it as what this one would make. It is looked
        up under the lock of the work area: whoever held that before may just have made it.
        """
        name = self.experiment.name
        suits = _strictly if self.experiment.strict_toolchain else None
        record = self.store.reusable(name, step.asset, fingerprint, suits)
        if record is not None:
            self._say_reused(step, record, "its recipe, code and inputs are unchanged")
            return self._published(self._renewed(step, work, record, inputs))
        found = accepted_version(self.store, name, step.asset, fingerprint)
        if found is None or (suits is not None and not suits(found[0])):
            return None
        record, by = found
        said = Remark(record.experiment, record.asset, record.version, by.statement.id, by, own=True)
        self._say_reused(step, record, said.line())
        with self.work_area(step.asset, record.fingerprint) as own:
            return self._published(self._renewed(step, own, record, inputs))

    def _say_reused(self, step: Step, record: Record, why: str) -> None:
        elsewhere = (
            f"{record.experiment}/{record.asset}@" if record.experiment != self.experiment.name else ""
        )
        self.context.log.info(
            f"{step.asset}: reused {elsewhere}{record.version}; {why} "
            f"(made with {_how(record)}, {record.published_utc})"
        )
        if differing := toolchain_difference(record.environment):
            self.context.log.warning(f"{step.asset}: {toolchain_note(differing)}")

    def _renewed(self, step: Step, work: WorkArea, record: Record, inputs: Mapping[str, Published]) -> Record:
        """Return the latest version of this experiment with the content of a record."""
        renewed = self.store.renew(
            work,
            record,
            inputs=[item.as_input() for item in inputs.values()],
            blocking_checks=[check.name for check in step.checks if check.blocking],
            run=self.context.run.run_id,
        )
        if record.experiment != self.experiment.name:
            self.context.log.info(
                f"{step.asset}: published as {renewed.version} of this experiment, with the same files"
            )
            self._settle(renewed)
        elif renewed.version != record.version:
            self.context.log.info(
                f"{step.asset}: published {record.version} again as {renewed.version}, since a newer "
                "version was made with another recipe"
            )
        return renewed

    def _settle(self, made: Record) -> None:
        """Hold what was accepted for the fingerprint of an artifact against it."""
        for statement in settle_acceptances(self.store, made):
            same = statement.kind == "reproduced"
            self.context.log.warning(
                f"{made.asset}: {statement.artifact} was accepted as what present code makes: "
                f"{'it came out the same' if same else 'REFUTED, it is different'}"
            )

    def build(self, step: Step, work: WorkArea, fingerprint: str) -> Build:
        """Return what the asset's function works with; what is said of code and machine is said now.

        What an earlier attempt left in the work area is used again unless source files were saved meanwhile
        that run in this process: it may be of the code in between. A job that goes on there without its
        orchestrator runs from sources of its own.
        """
        here = () if (work.path / DETACHED).exists() else loaded_here(step.closure)
        if here and not work.begun_with(step.tree.state(here)):
            self.context.log.warning(
                f"{step.asset}: begun anew, because source files were saved since an earlier attempt began"
            )
        code = code_of(step.tree, self.store.hasher)
        return Build(
            context=self.context,
            experiment=self.experiment,
            store=self.store,
            work=work,
            asset=step.asset,
            recipe=step.recipe,
            fingerprint=fingerprint,
            code=code.state,
            objects=keep(
                ObjectStore(self.store.root),
                step.tree,
                code,
                experiment=self.experiment.written,
                resolved=self.experiment.model_dump(mode="json", by_alias=True),
                run_config=self.context.run.run_config,
                run_id=self.context.run.run_id,
            ),
            environment=environment(),
            loaded=frozenset(loaded_modules()),
            _trainer=self.trainer,
            _shards=self.shards,
        )

    def publish(
        self,
        step: Step,
        build: Build,
        built: Built,
        inputs: Mapping[str, Published],
        fingerprint_payload: dict[str, Any],
        started: str,
    ) -> Published:
        """Publish a filled payload; nothing is built on it before its checks have spoken.

        Args:
            step: That is made.
            build: With its payload filled.
            built: What the maker says of it.
            inputs: By name; each name is the input's role.
            fingerprint_payload: What the fingerprint is the hash of.
            started: When making it began in this process, ISO 8601; a job may have been begun by another.

        Raises:
            SourcesChangedError: Source files that run in this process were saved while it was made; what was
                made is removed.
        """
        try:
            require_unchanged(step.tree, loaded_here(step.closure))
        except SourcesChangedError:
            build.work.clear()
            raise
        if unknown := unexplained(step.tree, step.closure, _loaded(build)):
            self.context.log.warning(
                f"{step.asset}: was made with {', '.join(unknown)}, which its fingerprint does not cover; "
                "name where that is imported from in vpmoe_assets/codebase/words.py, or why it does not "
                "matter in vpmoe_assets/codebase/bystanders.py"
            )
        attempts = [Attempt.model_validate(asdict(attempt)) for attempt in built.attempts]
        record = self.store.publish(
            build.work,
            Draft(
                fingerprint_payload=fingerprint_payload,
                inputs=tuple(item.as_input() for item in inputs.values()),
                execution=dict(built.execution),
                seed=step.seed,
                code=build.code,
                objects=_delivered_by(attempts, build.objects),
                environment=dict(build.environment),
                command=tuple(sys.argv),
                started_utc=attempts[0].started_utc if attempts else started,
                finished_utc=(attempts[-1].ended_utc if attempts else None) or utc_now(),
                metrics=dict(built.metrics),
                blocking_checks=tuple(check.name for check in step.checks if check.blocking),
                evals=tuple(built.evals),
                perf=tuple(built.perf),
                details=dict(built.details),
                dagster_run_id=self.context.run.run_id,
                attempts=tuple(attempts),
            ),
        )
        if record.dagster_run_id != self.context.run.run_id:
            self.context.log.info(
                f"{step.asset}: restored {record.version}, which had been removed or damaged: what was made "
                "is what had been published"
            )
        else:
            self.context.log.info(
                f"{step.asset}: made {record.version}, {human_bytes(sum(each.size for each in record.files))}"
            )
        self._settle(record)
        return self._published(record)

    def result(
        self,
        step: Step,
        item: Published,
        inputs: Mapping[str, Published],
        *,
        reused: bool,
        metadata: Callable[[Published], Mapping[str, Any]] | None = None,
    ) -> dg.MaterializeResult:
        """Judge and index a published version, and return what Dagster is told of it.

        A version that failed a check stays; where the check is blocking, what comes after refuses it.

        Args:
            step: That made it.
            item: The version.
            inputs: By name; each name is the input's role.
            reused: Whether it had been made before.
            metadata: What the UI shows beyond the common entries.
        """
        record = item.record
        found = judge(step.checks, item, inputs, self.store.statements, self.context.log.info)
        if (missed := self.index.update(self.store)) is not None:
            self.context.log.warning(missed)
        if not reused:
            self.context.log_event(record_written(self.experiment, record))
        # What its maker would have said of it, nobody said of one that was adopted.
        special = metadata(item) if metadata and not is_adopted(record) else {}
        shown = record_metadata(record, item.directory, self.store, reused=reused, special=special)
        return dg.MaterializeResult(
            asset_key=step.key,
            metadata=shown,
            data_version=dg.DataVersion(record.digest),
            check_results=check_results(found, step.key),
            tags={"vpmoe/reused": str(reused).lower(), VERSION_TAG: record.version},
        )

    def _published(self, record: Record) -> Published:
        active = [found for found in acceptances_of(record, self.store.statements) if found.active]
        acceptance = active[-1].statement.id if active else None
        return Published(record, self.store.directory(record), acceptance)


def _delivered_by(attempts: Sequence[Attempt], objects: Objects) -> Objects:
    """Return what is kept, with the sources of the start that delivered: it may have been another run's."""
    sources = attempts[-1].sources if attempts else None
    return objects if sources is None else objects.model_copy(update={"sources": sources})


def _loaded(build: Build) -> list[str]:
    return witnessed(build.work.output, build.work.run, build.loaded)


def _strictly(record: Record) -> bool:
    """Whether a record was made with the present torch and megatron-core."""
    return not toolchain_difference(record.environment)


def _how(record: Record) -> str:
    """Say how an artifact was made, e.g. `device=cpu dp=2`."""
    return " ".join(f"{name}={value}" for name, value in sorted(record.execution.items())) or "device=cpu"
