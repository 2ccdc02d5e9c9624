"""An asset from a function: inputs required, reused or built, published, judged, indexed.

An asset module states what an asset *is* (inputs by parameter name, recipe, code, checks) and how to fill its
payload; everything that must be the same for all of them is here and in `making`, once.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import dagster as dg

from trainer.contract.credentials import clean_error, without_credentials
from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.making import Making
from vpmoe_assets.assets.step import Produced, Step, asset_key, catalogued
from vpmoe_assets.build import Built, Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.codebase.tree import current
from vpmoe_assets.errors import DataError, WorkerError
from vpmoe_assets.lineage.errors import LineageError
from vpmoe_assets.lineage.record import utc_now
from vpmoe_assets.resources.disk import disk_trouble
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.shards import ShardsResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource


def produced_asset(
    experiment: Experiment,
    *,
    group: str,
    kinds: set[str],
    recipe: Mapping[str, Any],
    roots: Sequence[str],
    checks: Sequence[Check] = (),
    metadata: Callable[[Published], Mapping[str, Any]] | None = None,
    external: Callable[[], Mapping[str, str]] | None = None,
    seed: int | None = None,
    trains: bool = False,
    sharded: bool = False,
    pool: str | None = "gpu",
    partial: Sequence[str] = (),
    name: str | None = None,
    description: str | None = None,
    inputs: Sequence[str] | None = None,
) -> Callable[[Callable[..., Built]], Produced]:
    """Turn a function `(build, *inputs) -> Built` into an asset whose every version is a recorded artifact.

    The function's name is the asset's, its docstring the UI's description, and each parameter after the first
    names an upstream asset, handed over as `Published`. Where one function makes several assets, name,
    description and inputs are given instead.

    Args:
        experiment: The experiment in force.
        group: Dagster group.
        kinds: Dagster kinds.
        recipe: Identity of the step: resolved, JSON-able.
        roots: Modules that make the bytes: of a library, or of a trainer's job (`job_roots`). They and all
            that they import are the code of the step.
        checks: Run on what is published, before anything is built on it.
        metadata: What the UI shows of a published version beyond the common entries.
        external: Digests of inputs that are not assets (a local folder), taken when the step runs.
        seed: Of the step, if it draws random numbers; part of its identity.
        trains: Whether it launches a trainer job.
        sharded: Whether its work is divided into shards that an engine runs.
        pool: Of such a job; None for a short one that need not queue (a job on CUDA takes its GPU by a lease,
            in the pool or not).
        partial: Names of further upstream assets, handed over by keyword, each only if it was ever published.
        name: Of the asset, in place of the function's.
        description: In place of the docstring.
        inputs: Names of upstream assets, in place of the parameters'; handed over by keyword.
    """

    def decorate(function: Callable[..., Built]) -> Produced:
        step = Step(
            experiment,
            name or function.__name__,
            recipe,
            current().closure(roots),
            seed,
            checks,
            tuple(_parameters(function) if inputs is None else inputs),
            tuple(partial),
            external,
        )

        def make(making: Making) -> dg.MaterializeResult:
            there = [name for name in step.partial if making.ever_published(name)]
            upstream = making.published([*step.inputs, *there])
            item, reused = _made(making, step, function, upstream)
            return making.result(step, item, upstream, reused=reused, metadata=metadata)

        described: dict[str, Any] = {
            "key": step.key,
            "description": description or inspect.getdoc(function),
            "group_name": group,
            "kinds": kinds,
            "code_version": step.code_version,
            "deps": [asset_key(experiment, name) for name in [*step.inputs, *step.partial]],
            "check_specs": step.check_specs,
            "metadata": code_reference(function),
            **catalogued(experiment, trains=trains),
        }
        if trains:
            build = _scoring_asset if sharded else _training_asset
            return Produced(build(step, make, described, pool), (step,))
        asset = (_sharded_asset if sharded else _asset)(step, make, described)
        return Produced(asset, (step,))

    return decorate


def _parameters(function: Callable[..., Built]) -> list[str]:
    """Return the names of a function's parameters after the first."""
    parameters = inspect.signature(function).parameters.values()
    return [item.name for item in parameters if item.kind is not item.VAR_KEYWORD][1:]


def _made(
    making: Making, step: Step, function: Callable[..., Built], upstream: Mapping[str, Published]
) -> tuple[Published, bool]:
    """Return the artifact of a step with these inputs, and whether it had been made before."""
    fingerprint, payload = step.fingerprint(upstream)
    with making.work_area(step.asset, fingerprint) as work:
        if (item := making.reused(step, work, fingerprint, upstream)) is not None:
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


def _sharded_asset(
    step: Step, make: Callable[[Making], dg.MaterializeResult], described: Mapping[str, Any]
) -> dg.AssetsDefinition:
    @dg.asset(**described)
    def computed(
        context: dg.AssetExecutionContext, store: StoreResource, index: IndexResource, shards: ShardsResource
    ) -> dg.MaterializeResult:
        with explained(step.asset):
            return make(Making(step.experiment, context, store.open(), index, shards=shards))

    return computed


def _scoring_asset(
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
        shards: ShardsResource,
    ) -> dg.MaterializeResult:
        with explained(step.asset):
            return make(Making(step.experiment, context, store.open(), index, trainer, shards))

    return trained


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
    """Show a user what an error says, not where in the code it was raised, and without credentials."""
    try:
        with _in_words(asset):
            yield
    except Exception as error:
        if clean_error(error):
            raise
        said = without_credentials(f"{asset}: {type(error).__name__}: {error}")
        raise dg.Failure(said, allow_retries=False) from None


@contextmanager
def _in_words(asset: str) -> Iterator[None]:
    try:
        yield
    except (LineageError, DataError, WorkerError) as error:
        raise dg.Failure(f"{asset}: {error}", allow_retries=False) from None
    except OSError as error:
        if (trouble := disk_trouble(error)) is None:
            raise
        raise dg.Failure(f"{asset}: {trouble}", allow_retries=False) from error


def code_reference(function: Callable[..., Any]) -> dict[str, Any]:
    """Return the metadata by which the UI links to a function's source."""
    code = function.__code__
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", dg.BetaWarning)  # the UI's link to the source; pinned with dagster
        reference = dg.LocalFileCodeReference(file_path=code.co_filename, line_number=code.co_firstlineno)
        value = dg.CodeReferencesMetadataValue(code_references=[reference])
    return {"dagster/code_references": value}
