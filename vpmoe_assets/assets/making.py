"""How every asset is made: inputs required, fingerprint taken, reused or built, checked, published, indexed.

An asset module states what an asset *is* (inputs by parameter name, recipe, source files, checks) and how to
fill its payload; everything that must be the same for all of them is here, once.
"""

import inspect
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import dagster as dg

from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.presentation import record_metadata
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.pool import WorkerError
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.fingerprint import code_version, recipe_fingerprint, source_digests
from vpmoe_assets.lineage.provenance import code_state, environment
from vpmoe_assets.lineage.record import CheckOutcome, CodeState, Draft, Record
from vpmoe_assets.lineage.renewal import make_latest
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource


def asset_key(experiment: Experiment, asset: str) -> dg.AssetKey:
    """Return `<experiment>/<asset>`."""
    return dg.AssetKey([experiment.name, asset])


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
        checks: Run on the filled payload before it is published.
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
        asset = name or function.__name__
        parameters = inspect.signature(function).parameters.values()
        named = [item.name for item in parameters if item.kind is not item.VAR_KEYWORD][1:]
        required = named if inputs is None else list(inputs)
        source_files = source_digests([Path(source) for source in sources])
        identity = dict(recipe) if seed is None else {**recipe, "seed": seed}

        def materialize(
            context: dg.AssetExecutionContext,
            store: Store,
            index: IndexResource,
            trainer: TrainerResource | None,
        ) -> dg.MaterializeResult:
            there = [name for name in partial if store.latest(experiment.name, name) is not None]
            upstream = {name: published(store, experiment, name) for name in [*required, *there]}
            digests = {name: item.record.digest for name, item in upstream.items()}
            fingerprint, payload = recipe_fingerprint(
                identity, source_files, digests | dict(external() if external else {})
            )
            with store.work_area(experiment.name, asset, fingerprint) as work:
                # Looked up under the lock: whoever held it before may just have made it.
                record = store.reusable(experiment.name, asset, fingerprint)
                reused = record is not None
                if record is None:
                    build = Build(
                        context=context,
                        experiment=experiment,
                        store=store,
                        work=work,
                        asset=asset,
                        recipe=recipe,
                        fingerprint=fingerprint,
                        code=CodeState.model_validate(code_state(ROOT)),
                        environment=environment(),
                        _trainer=trainer,
                    )
                    record = _produce(build, function, upstream, payload, checks, seed)
                else:
                    context.log.info(
                        f"{asset}: reused {record.version}; its recipe, code and inputs are unchanged "
                        f"(made with {_how(record)}, {record.published_utc})"
                    )
                    renewed = make_latest(store, work, record)
                    if renewed.version != record.version:
                        context.log.info(
                            f"{asset}: published {record.version} again as {renewed.version}, since a newer "
                            "version was made with another recipe"
                        )
                    record = renewed
            return materialized(record, store, index, reused=reused, metadata=metadata)

        common: dict[str, Any] = {
            "key": asset_key(experiment, asset),
            "description": description or inspect.getdoc(function),
            "group_name": group,
            "kinds": kinds,
            "code_version": code_version(identity, source_files)[:16],
            "deps": [asset_key(experiment, name) for name in [*required, *partial]],
            "check_specs": [
                dg.AssetCheckSpec(
                    check.name,
                    asset=asset_key(experiment, asset),
                    blocking=check.blocking,
                    description=check.description or None,
                )
                for check in checks
            ],
            "metadata": code_reference(function),
        }
        if trains:

            @dg.asset(**common, pool=pool)
            def trained(
                context: dg.AssetExecutionContext,
                store: StoreResource,
                index: IndexResource,
                trainer: TrainerResource,
            ) -> dg.MaterializeResult:
                with explained(asset):
                    return materialize(context, store.open(), index, trainer)

            return trained

        @dg.asset(**common)
        def computed(
            context: dg.AssetExecutionContext, store: StoreResource, index: IndexResource
        ) -> dg.MaterializeResult:
            with explained(asset):
                return materialize(context, store.open(), index, None)

        return computed

    return decorate


@contextmanager
def explained(asset: str) -> Iterator[None]:
    """Show a user what the message of an error says, and not where in the code it was raised."""
    try:
        yield
    except (LineageError, DataError, WorkerError) as error:
        raise dg.Failure(f"{asset}: {error}", allow_retries=False) from None


def published(store: Store, experiment: Experiment, asset: str) -> Published:
    """Return the latest artifact of an asset, verified.

    Raises:
        LineageError: It is missing, damaged, or a blocking check of it failed.
    """
    record = store.require(experiment.name, asset)
    return Published(record, store.directory(record))


def materialized(
    record: Record,
    store: Store,
    index: IndexResource,
    *,
    reused: bool,
    metadata: Callable[[Published], Mapping[str, Any]] | None = None,
    asset_key: dg.AssetKey | None = None,
) -> dg.MaterializeResult:
    """Index a published version and return what Dagster is told of it.

    Args:
        record: Of the version.
        store: It lies in.
        index: To insert it into.
        reused: Whether it had been made before.
        metadata: What the UI shows beyond the common entries.
        asset_key: Of the asset, where a step makes several.
    """
    index.insert(record, store)
    item = Published(record, store.directory(record))
    shown = record_metadata(item.record, item.directory, store, reused=reused)
    return dg.MaterializeResult(
        asset_key=asset_key,
        metadata=shown | dict(metadata(item) if metadata else {}),
        data_version=dg.DataVersion(record.digest),
        check_results=[_check_result(outcome) for outcome in record.checks],
        tags={"vpmoe/reused": str(reused).lower(), "vpmoe/version": record.version},
    )


def _produce(
    build: Build,
    function: Callable[..., Built],
    upstream: Mapping[str, Published],
    fingerprint_payload: dict[str, Any],
    checks: Sequence[Check],
    seed: int | None,
) -> Record:
    started = utc_now()
    built = function(build, **upstream)
    return check_and_publish(
        build, built, upstream, fingerprint_payload, checks=checks, seed=seed, started=started
    )


def check_and_publish(
    build: Build,
    built: Built,
    upstream: Mapping[str, Published],
    fingerprint_payload: dict[str, Any],
    *,
    checks: Sequence[Check] = (),
    seed: int | None = None,
    started: str,
) -> Record:
    """Run the checks on the filled payload and publish it with what they said.

    Args:
        build: With its payload filled.
        built: What the maker says of it.
        upstream: The inputs by name; each name is the input's role.
        fingerprint_payload: What the fingerprint is the hash of.
        checks: To run; a failed one is published too, and refused by what comes after where it is blocking.
        seed: Of the step, if it draws random numbers.
        started: When making it began, ISO 8601.
    """
    outcomes = []
    for check in checks:
        passed, description, details = check.run(build, upstream)
        outcomes.append(
            CheckOutcome(
                name=check.name,
                passed=passed,
                blocking=check.blocking,
                severity="ERROR" if check.blocking else "WARN",
                description=description,
                metadata=dict(details),
            )
        )
        build.context.log.info(f"{build.asset}: check {check.name} {'passed' if passed else 'FAILED'}")
    return build.store.publish(
        build.work,
        Draft(
            fingerprint_payload=fingerprint_payload,
            inputs=tuple(item.record.as_input() for item in upstream.values()),
            execution=dict(built.execution),
            seed=seed,
            code=build.code,
            environment=dict(build.environment),
            command=tuple(sys.argv),
            started_utc=started,
            finished_utc=utc_now(),
            metrics=dict(built.metrics),
            checks=tuple(outcomes),
            evals=tuple(built.evals),
            details=dict(built.details),
            dagster_run_id=build.context.run.run_id,
        ),
    )


def _how(record: Record) -> str:
    """Say how an artifact was made, e.g. `device=cpu dp=2`."""
    return " ".join(f"{name}={value}" for name, value in sorted(record.execution.items())) or "device=cpu"


def _check_result(outcome: CheckOutcome) -> dg.AssetCheckResult:
    return dg.AssetCheckResult(
        check_name=outcome.name,
        passed=outcome.passed,
        severity=dg.AssetCheckSeverity.ERROR if outcome.severity == "ERROR" else dg.AssetCheckSeverity.WARN,
        description=outcome.description or None,
        metadata=dict(outcome.metadata),
    )


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
