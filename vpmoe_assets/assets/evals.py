"""Evaluations: what each checkpoint scores, what a rung lost and won back.

An evaluation depends on its checkpoint, on what all are measured on, and on the recipe; on no other
evaluation. Those that are due are measured in one process, which shares its start; each works in a work area
of its own, found again by its own fingerprint, and is published whatever becomes of the others. What changed
since the checkpoint before is derived from two reports wherever it is shown.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import dagster as dg
import orjson

from trainer.contract.attempts import read_attempts
from trainer.contract.canonical import sha256_json
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.job import Part
from trainer.contract.status import ATTEMPTS_NAME, SUMMARY_NAME, TASKS_NAME
from vpmoe_assets.assets.ladder import ladder_report
from vpmoe_assets.assets.making import Making
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import code_reference, explained
from vpmoe_assets.assets.step import Produced, Step, asset_key, catalogued
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.codebase.tree import current
from vpmoe_assets.codebase.words import job_roots
from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.names import eval_name
from vpmoe_assets.lineage.errors import ArtifactMissing, LineageError
from vpmoe_assets.lineage.record import utc_now
from vpmoe_assets.lineage.workarea import WorkArea
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource

SHARED_INPUTS = ("core8_bundle", "healing_text_v1", "synth_kd_v1", "o200k_tokenizer")
"""What every checkpoint is measured on, and the tokenizer of ours."""


def evals_assets(experiment: Experiment, checkpoints: Sequence[str]) -> list[Produced]:
    """Return the `evals` group of an experiment.

    Args:
        experiment: The experiment; without an `[evaluation]` it measures nothing.
        checkpoints: Those that the graph makes, in the order of the ladder.
    """
    if experiment.evaluation is None or experiment.sources.core8 is None or not checkpoints:
        return []

    names = {name: eval_name(name) for name in checkpoints}
    return [_evaluations(experiment, checkpoints), ladder_report(experiment, names)]


@dataclass(frozen=True)
class _Plan:
    """How a checkpoint is measured, whatever else is."""

    checkpoint: str
    step: Step


@dataclass(frozen=True)
class _Due:
    """A checkpoint that has to be measured: what with, in which work area."""

    plan: _Plan
    inputs: Mapping[str, Published]
    fingerprint: str
    fingerprint_payload: dict[str, Any]
    work: WorkArea

    @property
    def measured(self) -> bool:
        """Whether a job has delivered it."""
        return (self.work.output / SUMMARY_NAME).is_file()

    @property
    def part(self) -> Part:
        """What the job is told of it."""
        return Part(
            recipe_fingerprint=self.fingerprint,
            work_dir=str(self.work.path),
            output_dir=str(self.work.output),
        )

    def tidy(self) -> None:
        """Forget an attempt of which nothing is worth going on from."""
        if not self.measured and not any((self.work.path / TASKS_NAME).glob("*")):
            self.work.clear()


def _plan(experiment: Experiment, checkpoint: str) -> _Plan:
    recipe = plain(experiment.evaluate_recipe(checkpoint))
    step = Step(
        experiment,
        eval_name(checkpoint),
        recipe,
        current().closure(job_roots("evaluate", recipe)),
        experiment.seed,
        inputs=(checkpoint, *SHARED_INPUTS),
    )
    return _Plan(checkpoint, step)


def _spec(plan: _Plan) -> dg.AssetSpec:
    return dg.AssetSpec(
        plan.step.key,
        deps=[asset_key(plan.step.experiment, name) for name in plan.step.inputs],
        description=(
            f"What `{plan.checkpoint}` scores, shown with what changed since the checkpoint before.\n\n"
            "CORE-8, held-out losses of text and conversations, copying of numbers, validity of "
            "generated Harmony. Tracking only, no thresholds. All evaluations that are due run in one "
            "process."
        ),
        group_name="evals",
        kinds={"pytorch", "json"},
        code_version=plan.step.code_version,
        metadata={
            "measures": dg.MetadataValue.asset(asset_key(plan.step.experiment, plan.checkpoint)),
            **code_reference(_evaluations),
        },
        **catalogued(plan.step.experiment, trains=True),
    )


def _evaluations(experiment: Experiment, checkpoints: Sequence[str]) -> Produced:
    plans = [_plan(experiment, name) for name in checkpoints]

    @dg.multi_asset(
        specs=[_spec(plan) for plan in plans],
        can_subset=True,
        name=f"{experiment.name}__evaluations",
        pool="gpu",
    )
    def evaluations(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        index: IndexResource,
        trainer: TrainerResource,
    ) -> Iterator[dg.MaterializeResult]:
        chosen = {key.path[-1] for key in context.selected_asset_keys}
        with explained("evaluations"):
            making = Making(experiment, context, store.open(), index, trainer)
            asked = [plan for plan in plans if plan.step.asset in chosen]
            yield from _Evaluation(making, checkpoints).complete(asked)

    return Produced(evaluations, tuple(plan.step for plan in plans))


@dataclass(frozen=True)
class _Evaluation:
    """One step's evaluations."""

    making: Making
    checkpoints: Sequence[str]

    def complete(self, asked: Sequence[_Plan]) -> Iterator[dg.MaterializeResult]:
        """Reuse what is there, measure the rest in one process, publish each in the order of the ladder.

        Raises:
            dagster.Failure: The job failed; what it had measured by then is published all the same.
        """
        shared = self.making.published(SHARED_INPUTS)
        self.require_checkpoints(asked)
        with ExitStack() as held:
            due: list[_Due] = []
            for plan in asked:
                inputs = {**self.making.published([plan.checkpoint]), **shared}
                fingerprint, payload = plan.step.fingerprint(inputs)
                with ExitStack() as area:
                    work = area.enter_context(self.making.work_area(plan.step.asset, fingerprint))
                    found = self.making.reused(plan.step, work, fingerprint, inputs)
                    if found is None:
                        due.append(_Due(plan, inputs, fingerprint, payload, work))
                        held.enter_context(area.pop_all())  # until it is published
                if found is not None:
                    yield self.result(plan, found, inputs, reused=True)
            if due:
                yield from self.measure(due)

    def require_checkpoints(self, asked: Sequence[_Plan]) -> None:
        """Refuse before anything is done.

        Raises:
            ArtifactMissing: A checkpoint was never published.
        """
        missing = [plan.checkpoint for plan in asked if not self.making.ever_published(plan.checkpoint)]
        if missing:
            raise ArtifactMissing(
                f"{', '.join(missing)} were never published, so they cannot be evaluated; materialise them "
                "first, or select other evaluations"
            )

    def measure(self, due: Sequence[_Due]) -> Iterator[dg.MaterializeResult]:
        """Run one job for all that an earlier one has not measured, then publish.

        The job has one place in an experiment, so that whatever is due next ends and clears what a killed one
        left in it.
        """
        experiment, trainer = self.making.experiment, self.making.trainer
        assert trainer is not None, "the asset is given one"
        place = sha256_json({"experiment": experiment.name, "job": "evaluations"})
        with self.making.work_area("evaluations", place) as work:
            trainer.take_over(self.making.context, work.path)
            if not trainer.resume:
                for one in due:
                    one.work.clear()
            failure: dg.Failure | None = None
            unmeasured = [one for one in due if not one.measured]
            recipe = plain(experiment.evaluate_recipe(*(one.plan.checkpoint for one in unmeasured or due)))
            code = current().closure(job_roots("evaluate", recipe))
            step = Step(experiment, "evaluations", recipe, code, experiment.seed)
            job = self.making.build(step, work, place)
            if unmeasured:
                try:
                    job.run_job(
                        "evaluate",
                        {name: item for one in unmeasured for name, item in one.inputs.items()},
                        parts={one.plan.checkpoint: one.part for one in unmeasured},
                    )
                except dg.Failure as failed:
                    failure = failed
            for one in due:
                if one.measured:
                    yield self.result(one.plan, self.publish(one, job), one.inputs, reused=False)
                else:
                    one.tidy()
            if failure is not None:
                raise failure
            work.remove()

    def publish(self, one: _Due, job: Build) -> Published:
        """Publish one checkpoint's report."""
        from vpmoe_assets.evaluation.comparison import read_report
        from vpmoe_assets.evaluation.scores import scores

        step = one.plan.step
        summary = orjson.loads((one.work.output / SUMMARY_NAME).read_bytes())
        report = read_report(one.work.payload, one.plan.checkpoint)
        built = Built(
            metrics=report.content["metrics"],
            details={"object": report.name, "refused": report.content["refused"]},
            execution={**summary["execution"], "gpus": summary["gpus"], "seconds": summary["seconds"]},
            evals=scores(report.content, report.name, one.inputs[report.name].record.version),
            attempts=read_attempts(one.work.path / ATTEMPTS_NAME),
        )
        build = replace(job, work=one.work, asset=step.asset, recipe=step.recipe, fingerprint=one.fingerprint)
        return self.making.publish(step, build, built, one.inputs, one.fingerprint_payload, utc_now())

    def result(
        self, plan: _Plan, report: Published, inputs: Mapping[str, Published], *, reused: bool
    ) -> dg.MaterializeResult:
        """Return what Dagster is told, with what changed since the checkpoint before as things are now."""
        from vpmoe_assets.evaluation.comparison import sentences

        against, change = self.change(plan.checkpoint, report)
        for line in sentences(plan.checkpoint, change) if change else ():
            self.making.context.log.info(line)

        def metadata(item: Published) -> Mapping[str, Any]:
            return _report_metadata(item, against, change)

        return self.making.result(plan.step, report, inputs, reused=reused, metadata=metadata)

    def change(self, checkpoint: str, report: Published) -> tuple[str, dict[str, Any] | None]:
        """Return what a checkpoint is compared with, in words, and the difference where there is one."""
        from vpmoe_assets.evaluation.comparison import before, delta, read_report

        against = before(self.checkpoints, checkpoint)
        if against is None:
            return "nothing: the first of its ladder", None
        if not self.making.ever_published(eval_name(against)):
            return f"nothing: {against} has not been evaluated", None
        try:
            (theirs,) = self.making.published([eval_name(against)]).values()
            ours = read_report(report.payload, checkpoint)
            return against, delta(ours, read_report(theirs.payload, against))
        except (LineageError, DataError) as error:  # of the other evaluation; this one stands
            return f"nothing: {error}", None


def _report_metadata(item: Published, against: str, change: Mapping[str, Any] | None) -> Mapping[str, Any]:
    from vpmoe_assets.evaluation.scores import core8_table

    name = item.record.details["object"]
    report = orjson.loads((item.payload / f"{name}.json").read_bytes())
    shown: dict[str, Any] = {
        "report": dg.MetadataValue.path(item.directory / "run" / f"{name}.json"),
        "compared_to": against,
    }
    if change is not None and "core8_centered_mean" in change:
        shown["core8_change"] = change["core8_centered_mean"]
    if "results" in report:
        shown["core8"] = table(core8_table(report, change))
    for suite, reason in report["refused"].items():
        shown[f"{suite} refused"] = reason
    return shown
