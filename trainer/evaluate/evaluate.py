"""The `evaluate` command: every checkpoint of a job through every suite, in one process."""

import gc
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.contract.canonical import canonical_json
from trainer.contract.files import replace_text
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.evaluate import Checkpoint, EvaluateRecipe, MegatronCheckpoint
from trainer.contract.schema.job import Job
from trainer.contract.status import PAYLOAD_NAME, SUMMARY_NAME
from trainer.errors import EvaluationError, TokenizerMismatchError
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.opening import is_checkpoint, open_model
from trainer.evaluate.report import (
    Report,
    check_finite,
    compose,
    enveloped,
    read_report,
    require_commit,
    write_report,
)
from trainer.evaluate.suite import Batching, SuiteContext, SuiteResult, find_suite
from trainer.job.deliverable import WRITING_NAME, write_summary
from trainer.job.distributed import session
from trainer.job.metrics import MetricsLog
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir

TOKENIZER_INPUT = "o200k_tokenizer"
REPORT_INPUT = "eval_{}"
"""Name of the input that holds the report of an object."""


def evaluate(job: Job, work: WorkDir, stop: StopRequest, *, batching: Batching | None = None) -> None:
    """Measure the checkpoints of a job and write its deliverable.

    A task that an earlier start of the same job finished is not done again. Weights & Biases is not used.

    Args:
        job: An `evaluate` job.
        work: Its work directory.
        stop: Asks for a clean stop.
        batching: How much to compute at once; by default what suits the device.

    Raises:
        Interrupted: Stopped as asked; finished tasks are kept.
        ConfigError: The job lacks an input, or brings a checkpoint that its recipe does not name.
        ValueError: A checkpoint, bundle, data set or baseline is not as it should be.
    """
    recipe = job.evaluate_recipe()
    require_commit(job)
    execution = job.execution
    with session(execution.device, tp=execution.tp, ep=execution.ep, dp=execution.dp) as layout:
        Run(job, recipe, work, stop, layout.device, batching).complete()


class Run:
    """One evaluation job."""

    def __init__(
        self,
        job: Job,
        recipe: EvaluateRecipe,
        work: WorkDir,
        stop: StopRequest,
        device: torch.device,
        batching: Batching | None,
    ) -> None:
        self.job, self.recipe, self.work, self.stop, self.device = job, recipe, work, stop, device
        self.batching = Batching.default(device.type) if batching is None else batching
        self.inputs = {name: Path(given.path) for name, given in job.inputs.items()}
        self.digests = {name: given.digest for name, given in job.inputs.items()}
        self.output = Path(job.output_dir)
        self.seconds: dict[str, dict[str, float]] = {}

    def complete(self) -> None:
        """Measure, write the payload, and the summary last."""
        started = time.perf_counter()
        self.check_inputs()
        baselines = self.baselines()
        scratch, payload, beside = (self.output / name for name in (WRITING_NAME, PAYLOAD_NAME, "reports"))
        for left in (scratch, payload, beside):
            if left.exists():  # of an attempt that ended before its summary
                shutil.rmtree(left)
            if left is not payload:
                left.mkdir(parents=True)
        (self.output / SUMMARY_NAME).unlink(missing_ok=True)
        log = MetricsLog(self.work.metrics)
        reports: dict[str, Report] = {}
        try:
            for name in measuring_order(self.recipe.checkpoints):
                report = self.measure(name, baselines | reports, log)
                reports[name] = report
                write_report(report, scratch)
                envelope = enveloped(report, self.job, self.inputs[name])
                replace_text(beside / f"{name}.json", canonical_json(envelope, indent=1) + "\n")
        finally:
            log.close()
        scratch.rename(payload)
        write_summary(self.output, self.summary(reports, time.perf_counter() - started))

    def check_inputs(self) -> None:
        """Refuse checkpoints that would silently be left out.

        Raises:
            ConfigError: An input is a checkpoint and the recipe does not name it.
        """
        forgotten = [
            name
            for name, path in self.inputs.items()
            if name not in self.recipe.checkpoints and is_checkpoint(path)
        ]
        if forgotten:
            raise ConfigError(
                f"inputs: {', '.join(forgotten)} hold weights, but recipe.checkpoints names only "
                f"{', '.join(self.recipe.checkpoints)}; name them there or leave them out"
            )

    def baselines(self) -> dict[str, Report]:
        """Report among the inputs that deltas are taken against.

        Raises:
            EvaluationError: One is neither an input nor made earlier in this job.
        """
        found: dict[str, Report] = {}
        for name, checkpoint in self.recipe.checkpoints.items():
            wanted = checkpoint.compare_to
            if wanted is not None and wanted not in self.recipe.checkpoints:
                given = REPORT_INPUT.format(wanted)
                if given not in self.inputs:
                    raise EvaluationError(
                        f"{name} is to be compared with {wanted}, whose report is missing: give the input "
                        f"{given}, evaluate {wanted} in the same job, or set compare_to to null"
                    )
                found[wanted] = read_report(self.inputs[given], wanted)
        return found

    def measure(self, name: str, known: dict[str, Report], log: MetricsLog) -> Report:
        """Run all suites on one checkpoint."""
        checkpoint = self.recipe.checkpoints[name]
        self.work.at(f"{name}: open", len(self.seconds))
        model = open_model(
            self.inputs[name],
            name=name,
            device=self.device,
            dtype=self.recipe.dtype,
            expected=checkpoint,
            tokenizer=self.inputs.get(TOKENIZER_INPUT),
            backend=self.recipe.backend,
        )
        if self.recipe.max_len > model.context:
            raise EvaluationError(
                f"max_len = {self.recipe.max_len} is more than the {model.context} tokens that {name} can "
                "read; every checkpoint is measured with the same max_len, so lower it"
            )
        context = SuiteContext(
            object=name,
            inputs=self.inputs,
            digests=self.digests,
            seed=self.job.seed,
            state=self.work.path / "evaluate" / name,
            stop=self.stop,
            batching=self.batching,
            beat=lambda task: self.work.at(f"{name}: {task}", len(self.seconds)),
        )
        results: dict[str, SuiteResult] = {}
        refused: dict[str, str] = {}
        self.seconds[name] = {}
        for suite in self.suites(model):
            began = time.perf_counter()
            try:
                result = find_suite(suite)(model, self.recipe, context)
            except TokenizerMismatchError as error:
                LOGGER.warning("%s: %s refused: %s", name, suite, error)
                refused[suite] = str(error)
                continue
            check_finite(suite, list(result.metrics.items()))
            results[suite] = result
            self.seconds[name][suite] = round(time.perf_counter() - began, 3)
            log.write(
                sum(map(len, self.seconds.values())),
                {"object": name, "suite": suite, **{f"{name}/{key}": v for key, v in result.metrics.items()}},
            )
            LOGGER.info("%s: %s in %.1f s", name, suite, self.seconds[name][suite])
        wanted = checkpoint.compare_to
        report = compose(
            model,
            self.recipe,
            context,
            results,
            refused,
            experiment=self.job.experiment,
            baseline=None if wanted is None else known[wanted],
        )
        self.say(report)
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return report

    def suites(self, model: LanguageModel) -> tuple[str, ...]:
        """Return the recipe's suites, and the routers' health where there are routers."""
        architecture = model.architecture
        routers = ("router",) if architecture is not None and architecture.moe is not None else ()
        return (*self.recipe.suites, *routers)

    def say(self, report: Report) -> None:
        """Log the score and, always, what it is against the rung before."""
        content, change = report.content, report.content["delta"]
        if "core8_centered_mean" in content:
            text = (
                f"{report.name}: CORE-8 centred {content['core8_centered_mean']:+.4f} "
                f"± {content['stderr']['core8_centered_mean']:.4f}"
            )
            if change is not None and "core8_centered_mean" in change:
                text += f", {change['core8_centered_mean']:+.4f} against {change['compared_to']}"
            LOGGER.info(text)
        for name, value in (change or {}).get("metrics", {}).items():
            if name.endswith("/nll"):
                LOGGER.info("%s: %s %+.4f against %s", report.name, name, value, change["compared_to"])

    def summary(self, reports: dict[str, Report], seconds: float) -> dict[str, Any]:
        """Return what the orchestrator records of the job."""
        return {
            "command": self.job.command,
            "asset": self.job.asset,
            "experiment": self.job.experiment,
            "recipe_fingerprint": self.job.recipe_fingerprint,
            "objects": {
                name: {
                    "format": "megatron"
                    if isinstance(self.recipe.checkpoints[name], MegatronCheckpoint)
                    else "huggingface",
                    "metrics": dict(report.content["metrics"]),
                    "refused": report.content["refused"],
                    "delta": report.content["delta"],
                    "seconds": self.seconds[name],
                }
                for name, report in reports.items()
            },
            "payload": sorted(path.name for path in (self.output / PAYLOAD_NAME).iterdir()),
            "reports": [f"reports/{name}.json" for name in reports],
            "dtype": self.recipe.dtype,
            "device": self.device.type,
            "batching": {"rows": self.batching.rows, "tokens": self.batching.tokens},
            "wall_seconds": round(seconds, 3),
        }


def measuring_order(checkpoints: Mapping[str, Checkpoint]) -> tuple[str, ...]:
    """Return the checkpoints in the order of measuring: what another is compared with comes before it.

    JSON objects have no order, so that of `checkpoints` means nothing.
    """
    done: list[str] = []
    left = sorted(checkpoints)
    while left:
        ready = [name for name in left if checkpoints[name].compare_to not in left]
        done += ready
        left = [name for name in left if name not in ready]
    return tuple(done)
