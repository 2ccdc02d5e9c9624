"""Evaluations: what each checkpoint scores, what a rung lost and won back."""

import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import dagster as dg
import orjson

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.status import LOG_NAME, PAYLOAD_NAME
from vpmoe_assets.assets.ladder import ladder_report
from vpmoe_assets.assets.making import Making, utc_now
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import code_reference, explained
from vpmoe_assets.assets.step import Produced, Step, asset_key
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.codebase.tree import current
from vpmoe_assets.codebase.words import job_roots
from vpmoe_assets.evaluation.scores import core8_table, scores
from vpmoe_assets.lineage.errors import ArtifactMissing
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource, TrainerResult

SHARED_INPUTS = ("core8_bundle", "healing_text_v1", "synth_kd_v1", "o200k_tokenizer")
"""What every checkpoint is measured on, and the tokenizer of ours."""


def eval_name(checkpoint: str) -> str:
    """Return the asset that measures a checkpoint."""
    return f"eval_{checkpoint}"


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


@dataclass
class _Planned:
    """A checkpoint's evaluation: found in the store, or to be made."""

    checkpoint: str
    step: Step
    before: str | None
    """The checkpoint it is compared with, where that one is evaluated too."""
    inputs: dict[str, Published] = field(default_factory=dict)


def _recipe(experiment: Experiment, checkpoints: Sequence[str], measured: Sequence[str]) -> dict[str, Any]:
    """Return the recipe of an evaluation; deltas are taken against checkpoints that are evaluated at all."""
    recipe = plain(experiment.evaluate_recipe(*checkpoints))
    for checkpoint in recipe["checkpoints"].values():
        if checkpoint.get("compare_to") not in measured:
            checkpoint.pop("compare_to", None)
    return recipe


def _plan(experiment: Experiment, checkpoint: str, measured: Sequence[str]) -> _Planned:
    recipe = _recipe(experiment, [checkpoint], measured)
    before = recipe["checkpoints"][checkpoint].get("compare_to")
    step = Step(
        experiment,
        eval_name(checkpoint),
        recipe,
        current().closure(job_roots("evaluate", recipe)),
        experiment.seed,
        inputs=(checkpoint, *SHARED_INPUTS, *([] if before is None else [eval_name(before)])),
    )
    return _Planned(checkpoint, step, before)


def _spec(plan: _Planned) -> dg.AssetSpec:
    return dg.AssetSpec(
        plan.step.key,
        deps=[asset_key(plan.step.experiment, name) for name in plan.step.inputs],
        description=(
            f"What `{plan.checkpoint}` scores, and what changed since the checkpoint before.\n\n"
            "CORE-8, held-out losses of text and conversations, copying of numbers, validity of "
            "generated Harmony. Tracking only, no thresholds. All evaluations that are due run in one "
            "process."
        ),
        group_name="evals",
        kinds={"pytorch", "json"},
        code_version=plan.step.code_version,
        metadata=code_reference(_evaluations),
    )


def _evaluations(experiment: Experiment, checkpoints: Sequence[str]) -> Produced:
    plans = [_plan(experiment, name, checkpoints) for name in checkpoints]

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
        asked = [_plan(experiment, name, checkpoints) for name in checkpoints if eval_name(name) in chosen]
        with explained("evaluations"):
            making = Making(experiment, context, store.open(), index, trainer)
            yield from _Evaluation(making, checkpoints).complete(asked)

    return Produced(evaluations, tuple(plan.step for plan in plans))


@dataclass
class _Evaluation:
    """One step's evaluations: those that are due in one job, all published one by one."""

    making: Making
    measured: Sequence[str]
    started: str = field(default_factory=utc_now)
    reports: dict[str, Published] = field(default_factory=dict)
    """Evaluations that are in the store, by checkpoint."""

    def complete(self, asked: Sequence[_Planned]) -> Iterator[dg.MaterializeResult]:
        """Reuse what is there, measure the rest in one process, and publish in the order of the ladder."""
        shared = self.making.published(SHARED_INPUTS)
        self.require_checkpoints(asked)
        names = {plan.checkpoint for plan in asked}
        due: list[_Planned] = []
        for plan in asked:
            plan.inputs = {**self.making.published([plan.checkpoint]), **shared}
            if plan.before is not None and plan.before not in names:
                (self.reports[plan.before],) = self.making.published([eval_name(plan.before)]).values()
            # The report that it is compared with may still have to be made; then this one is due as well.
            if (plan.before is None or plan.before in self.reports) and self.reused(plan):
                yield self.result(plan, reused=True)
            else:
                due.append(plan)
        if due:
            yield from self.measure(due)

    def require_checkpoints(self, asked: Sequence[_Planned]) -> None:
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

    def fingerprint(self, plan: _Planned) -> tuple[str, dict[str, Any]]:
        """Fingerprint and its payload; the report compared with must be in the store."""
        if plan.before is not None:
            plan.inputs[eval_name(plan.before)] = self.reports[plan.before]
        return plan.step.fingerprint(plan.inputs)

    def reused(self, plan: _Planned) -> bool:
        """Take the evaluation as the store has it, if it has it."""
        fingerprint, _ = self.fingerprint(plan)
        with self.making.work_area(plan.step.asset, fingerprint) as work:
            report = self.making.reused(plan.step, work, fingerprint)
        if report is not None:
            self.reports[plan.checkpoint] = report
        return report is not None

    def result(self, plan: _Planned, *, reused: bool) -> dg.MaterializeResult:
        report = self.reports[plan.checkpoint]
        return self.making.result(plan.step, report, plan.inputs, reused=reused, metadata=_report_metadata)

    def measure(self, due: Sequence[_Planned]) -> Iterator[dg.MaterializeResult]:
        """Run one job for all that is due, then publish each report."""
        experiment, names = self.making.experiment, [plan.checkpoint for plan in due]
        recipe = _recipe(experiment, names, self.measured)
        code = current().closure(job_roots("evaluate", recipe))
        step = Step(experiment, "evaluations", recipe, code, experiment.seed)
        inputs = {name: item for plan in due for name, item in plan.inputs.items()}
        for plan in due:
            if plan.before is not None and plan.before not in names:
                inputs[eval_name(plan.before)] = self.reports[plan.before]
        fingerprint, _ = step.fingerprint(inputs)
        with self.making.work_area(step.asset, fingerprint) as work:
            job = self.making.build(step, work, fingerprint)
            result = job.run_job("evaluate", inputs)
            for plan in due:
                self.publish(plan, job, result)
                yield self.result(plan, reused=False)
            work.remove()

    def publish(self, plan: _Planned, job: Build, result: TrainerResult) -> None:
        """Take one checkpoint's report out of the finished job and publish it."""
        fingerprint, payload = self.fingerprint(plan)
        name, output = plan.checkpoint, job.work.output
        with self.making.work_area(plan.step.asset, fingerprint) as work:
            work.clear()
            for suffix in (".json", ".items.jsonl"):
                shutil.copy2(output / PAYLOAD_NAME / f"{name}{suffix}", work.payload)
            shutil.copy2(output / "reports" / f"{name}.json", work.run)
            shutil.copy2(job.work.path / LOG_NAME, work.run)
            self.reports[name] = self.making.publish(
                plan.step,
                replace(
                    job, work=work, asset=plan.step.asset, recipe=plan.step.recipe, fingerprint=fingerprint
                ),
                _built(work.payload, plan.inputs[name], result),
                plan.inputs,
                payload,
                self.started,
            )


def _built(payload: Path, measured: Published, result: TrainerResult) -> Built:
    """Return what a report says of the checkpoint that it measured."""
    name, version = measured.record.asset, measured.record.version
    report = orjson.loads((payload / f"{name}.json").read_bytes())
    seconds = result.summary["objects"][name]["seconds"]
    return Built(
        metrics=report["metrics"],
        details={"object": name, "delta": report["delta"], "refused": report["refused"]},
        execution={**result.execution, "gpus": list(result.devices), "seconds": seconds},
        evals=scores(report, name, version),
    )


def _report_metadata(item: Published) -> Mapping[str, Any]:
    name = item.record.details["object"]
    report = orjson.loads((item.payload / f"{name}.json").read_bytes())
    shown: dict[str, Any] = {
        "report": dg.MetadataValue.path(item.directory / "run" / f"{name}.json"),
        "compared_to": (report["delta"] or {}).get("compared_to", "nothing: the first of its ladder"),
    }
    if "results" in report:
        shown["core8"] = table(core8_table(report))
    for suite, reason in report["refused"].items():
        shown[f"{suite} refused"] = reason
    return shown
