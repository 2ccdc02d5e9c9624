"""How every asset is made: inputs required, fingerprint taken, reused or built, checked, published, indexed.

An asset module states what an asset *is* (inputs by parameter name, recipe, source files, checks) and how to
fill its payload; everything that must be the same for all of them is here, once. `produced_asset` is for an
asset with a step of its own; a step that makes several goes by `Step` and `Making` itself.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.judging import check_results, judge
from vpmoe_assets.assets.presentation import record_metadata
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.errors import DataError, WorkerError
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.fingerprint import code_version, recipe_fingerprint, source_digests
from vpmoe_assets.lineage.provenance import code_state, environment
from vpmoe_assets.lineage.record import CodeState, Draft, Record
from vpmoe_assets.lineage.renewal import make_latest
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.workarea import WorkArea
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource


@dataclass(frozen=True)
class Step:
    """What makes an asset, before its inputs are known.

    Attributes:
        experiment: The experiment in force.
        asset: Bare name.
        recipe: Identity of the step: resolved, JSON-able.
        sources: sha256 of the files whose code decides the bytes, by path.
        seed: Of the step, if it draws random numbers; part of its identity.
        checks: Run on what is published, before anything is built on it.
    """

    experiment: Experiment
    asset: str
    recipe: Mapping[str, Any]
    sources: Mapping[str, str]
    seed: int | None = None
    checks: Sequence[Check] = ()

    @property
    def key(self) -> dg.AssetKey:
        """Of the asset."""
        return asset_key(self.experiment, self.asset)

    @property
    def identity(self) -> dict[str, Any]:
        """Recipe and seed."""
        return dict(self.recipe) if self.seed is None else {**self.recipe, "seed": self.seed}

    @property
    def code_version(self) -> str:
        """Identity and sources, hashed, for Dagster."""
        return code_version(self.identity, self.sources)[:16]

    @property
    def check_specs(self) -> list[dg.AssetCheckSpec]:
        """Of the checks, for Dagster."""
        return [
            dg.AssetCheckSpec(
                check.name, asset=self.key, blocking=check.blocking, description=check.description
            )
            for check in self.checks
        ]

    def fingerprint(
        self, inputs: Mapping[str, Published], external: Mapping[str, str] | None = None
    ) -> tuple[str, dict[str, Any]]:
        """Return the recipe fingerprint and the payload it is the hash of.

        Args:
            inputs: By name; each name is the input's role.
            external: Digests of inputs that are not assets.
        """
        digests = {name: item.record.digest for name, item in inputs.items()}
        return recipe_fingerprint(self.identity, self.sources, digests | dict(external or {}))


@dataclass(frozen=True)
class Making:
    """A Dagster step at work: where its inputs are found, and where what it makes goes."""

    experiment: Experiment
    context: dg.AssetExecutionContext
    store: Store
    index: IndexResource
    trainer: TrainerResource | None = None

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

    def reused(self, step: Step, work: WorkArea, fingerprint: str) -> Published | None:
        """Return the artifact of this fingerprint, made the latest one again, or None where there is none.

        It is looked up under the lock of the work area: whoever held that before may just have made it.
        """
        record = self.store.reusable(self.experiment.name, step.asset, fingerprint)
        if record is None:
            return None
        log = self.context.log.info
        log(
            f"{step.asset}: reused {record.version}; its recipe, code and inputs are unchanged "
            f"(made with {_how(record)}, {record.published_utc})"
        )
        renewed = make_latest(self.store, work, record)
        if renewed.version != record.version:
            log(
                f"{step.asset}: published {record.version} again as {renewed.version}, since a newer "
                "version was made with another recipe"
            )
        return self._published(renewed)

    def build(self, step: Step, work: WorkArea, fingerprint: str) -> Build:
        """Return what the asset's function works with; the state of code and machine is taken now."""
        return Build(
            context=self.context,
            experiment=self.experiment,
            store=self.store,
            work=work,
            asset=step.asset,
            recipe=step.recipe,
            fingerprint=fingerprint,
            code=CodeState.model_validate(code_state(ROOT)),
            environment=environment(),
            _trainer=self.trainer,
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
            started: When making it began, ISO 8601.
        """
        record = self.store.publish(
            build.work,
            Draft(
                fingerprint_payload=fingerprint_payload,
                inputs=tuple(item.as_input() for item in inputs.values()),
                execution=dict(built.execution),
                seed=step.seed,
                code=build.code,
                environment=dict(build.environment),
                command=tuple(sys.argv),
                started_utc=started,
                finished_utc=utc_now(),
                metrics=dict(built.metrics),
                blocking_checks=tuple(check.name for check in step.checks if check.blocking),
                evals=tuple(built.evals),
                details=dict(built.details),
                dagster_run_id=self.context.run.run_id,
            ),
        )
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
        self.index.insert(record, self.store)
        shown = record_metadata(record, item.directory, self.store, reused=reused)
        return dg.MaterializeResult(
            asset_key=step.key,
            metadata=shown | dict(metadata(item) if metadata else {}),
            data_version=dg.DataVersion(record.digest),
            check_results=check_results(found, step.key),
            tags={"vpmoe/reused": str(reused).lower(), "vpmoe/version": record.version},
        )

    def _published(self, record: Record) -> Published:
        return Published(record, self.store.directory(record))


def produced_asset(
    experiment: Experiment,
    *,
    group: str,
    kinds: set[str],
    recipe: Mapping[str, Any],
    sources: Sequence[str | Path],
    checks: Sequence[Check] = (),
    metadata: Callable[[Published], Mapping[str, Any]] | None = None,
    external: Callable[[], Mapping[str, str]] | None = None,
    seed: int | None = None,
    trains: bool = False,
    pool: str | None = "gpu",
    partial: Sequence[str] = (),
    name: str | None = None,
    description: str | None = None,
    inputs: Sequence[str] | None = None,
) -> Callable[[Callable[..., Built]], dg.AssetsDefinition]:
    """Turn a function `(build, *inputs) -> Built` into an asset whose every version is a recorded artifact.

    The function's name is the asset's, its docstring the UI's description, and each parameter after the first
    names an upstream asset, handed over as `Published`. Where one function makes several assets, name,
    description and inputs are given instead.

    Args:
        experiment: The experiment in force.
        group: Dagster group.
        kinds: Dagster kinds.
        recipe: Identity of the step: resolved, JSON-able.
        sources: Files and directories, relative to the project, whose code decides the bytes.
        checks: Run on what is published, before anything is built on it.
        metadata: What the UI shows of a published version beyond the common entries.
        external: Digests of inputs that are not assets (a local folder), taken when the step runs.
        seed: Of the step, if it draws random numbers; part of its identity.
        trains: Whether it launches a trainer job.
        pool: Of such a job; None for a short one that need not queue (a job on CUDA takes its GPU by a lease,
            in the pool or not).
        partial: Names of further upstream assets, handed over by keyword, each only if it was ever published.
        name: Of the asset, in place of the function's.
        description: In place of the docstring.
        inputs: Names of upstream assets, in place of the parameters'; handed over by keyword.
    """

    def decorate(function: Callable[..., Built]) -> dg.AssetsDefinition:
        digests = source_digests([Path(source) for source in sources])
        step = Step(experiment, name or function.__name__, recipe, digests, seed, checks)
        required = _parameters(function) if inputs is None else list(inputs)

        def make(making: Making) -> dg.MaterializeResult:
            there = [name for name in partial if making.ever_published(name)]
            upstream = making.published([*required, *there])
            item, reused = _made(making, step, function, upstream, external() if external else {})
            return making.result(step, item, upstream, reused=reused, metadata=metadata)

        described: dict[str, Any] = {
            "key": step.key,
            "description": description or inspect.getdoc(function),
            "group_name": group,
            "kinds": kinds,
            "code_version": step.code_version,
            "deps": [asset_key(experiment, name) for name in [*required, *partial]],
            "check_specs": step.check_specs,
            "metadata": code_reference(function),
        }
        return _training_asset(step, make, described, pool) if trains else _asset(step, make, described)

    return decorate


def _parameters(function: Callable[..., Built]) -> list[str]:
    """Return the names of a function's parameters after the first."""
    parameters = inspect.signature(function).parameters.values()
    return [item.name for item in parameters if item.kind is not item.VAR_KEYWORD][1:]


def _made(
    making: Making,
    step: Step,
    function: Callable[..., Built],
    upstream: Mapping[str, Published],
    external: Mapping[str, str],
) -> tuple[Published, bool]:
    """Return the artifact of a step with these inputs, and whether it had been made before."""
    fingerprint, payload = step.fingerprint(upstream, external)
    with making.work_area(step.asset, fingerprint) as work:
        if (item := making.reused(step, work, fingerprint)) is not None:
            return item, True
        build, started = making.build(step, work, fingerprint), utc_now()
        built = function(build, **upstream)
        return making.publish(step, build, built, upstream, payload, started), False


def _asset(
    step: Step, make: Callable[[Making], dg.MaterializeResult], described: Mapping[str, Any]
) -> dg.AssetsDefinition:
    @dg.asset(**described)
    def computed(
        context: dg.AssetExecutionContext, store: StoreResource, index: IndexResource
    ) -> dg.MaterializeResult:
        with explained(step.asset):
            return make(Making(step.experiment, context, store.open(), index))

    return computed


def _training_asset(
    step: Step,
    make: Callable[[Making], dg.MaterializeResult],
    described: Mapping[str, Any],
    pool: str | None,
) -> dg.AssetsDefinition:
    @dg.asset(**described, pool=pool)
    def trained(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        index: IndexResource,
        trainer: TrainerResource,
    ) -> dg.MaterializeResult:
        with explained(step.asset):
            return make(Making(step.experiment, context, store.open(), index, trainer))

    return trained


@contextmanager
def explained(asset: str) -> Iterator[None]:
    """Show a user what the message of an error says, and not where in the code it was raised."""
    try:
        yield
    except (LineageError, DataError, WorkerError) as error:
        raise dg.Failure(f"{asset}: {error}", allow_retries=False) from None


def asset_key(experiment: Experiment, asset: str) -> dg.AssetKey:
    """Return `<experiment>/<asset>`."""
    return dg.AssetKey([experiment.name, asset])


def code_reference(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the metadata by which the UI links to a function's source."""
    code = function.__code__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # the UI's link to the source; pinned with dagster
        reference = dg.LocalFileCodeReference(file_path=code.co_filename, line_number=code.co_firstlineno)
        value = dg.CodeReferencesMetadataValue(code_references=[reference])
    return {"dagster/code_references": value}


def utc_now() -> str:
    """Return the time, ISO 8601 with milliseconds and offset."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _how(record: Record) -> str:
    """Say how an artifact was made, e.g. `device=cpu dp=2`."""
    return " ".join(f"{name}={value}" for name, value in sorted(record.execution.items())) or "device=cpu"
