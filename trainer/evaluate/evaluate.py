"""The `evaluate` command: every checkpoint of a job through every suite, in one process.

Each checkpoint is measured for itself and delivered as soon as it is: what else the job measures changes
nothing in its report, and neither does a checkpoint that cannot be measured.
"""

import gc
import time
from pathlib import Path
from typing import Any

import torch

from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.evaluate import EvaluateRecipe, MegatronCheckpoint
from trainer.contract.schema.job import Job
from trainer.errors import EvaluationError, TokenizerMismatchError
from trainer.evaluate.measurement import Measurement
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.opening import is_checkpoint, open_model
from trainer.evaluate.report import Report, check_finite, compose, enveloped, require_commit
from trainer.evaluate.suite import Batching, SuiteContext, SuiteResult, find_suite
from trainer.job.deliverable import write_summary
from trainer.job.distributed import session
from trainer.job.metrics import MetricsLog
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER, WorkDir

TOKENIZER_INPUT = "o200k_tokenizer"


def evaluate(job: Job, work: WorkDir, stop: StopRequest, *, batching: Batching | None = None) -> None:
    """Measure the checkpoints of a job, each into its own part of the deliverable.

    A task that an earlier start of the same job finished is not done again. Weights & Biases is not used.

    Args:
        job: An `evaluate` job.
        work: Its work directory.
        stop: Asks for a clean stop.
        batching: How much to compute at once; by default what suits the device.

    Raises:
        Interrupted: Stopped as asked; measured checkpoints and finished tasks are kept.
        ConfigError: The job lacks an input, or brings a checkpoint that its recipe does not name.
        EvaluationError: Checkpoints cannot be measured; all others are.
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
        self.steps = 0

    def complete(self) -> None:
        """Measure and deliver each checkpoint, and write the summary of the job last."""
        started = time.perf_counter()
        self.check_inputs()
        measurements = {name: Measurement(name, self.job.part(name)) for name in self.recipe.checkpoints}
        output = Path(self.job.output_dir)
        output.mkdir(parents=True, exist_ok=True)
        delivered: dict[str, dict[str, Any]] = {}
        failed: dict[str, str] = {}
        log = MetricsLog(self.work.metrics)
        try:
            for name, measurement in measurements.items():
                try:
                    delivered[name] = self.deliver(measurement, log)
                except ConfigError:  # it is the job's, not this checkpoint's
                    raise
                except ValueError as error:
                    LOGGER.error("%s cannot be measured: %s", name, error)
                    failed[name] = str(error)
        finally:
            log.close()
        if failed:
            raise EvaluationError("; ".join(f"{name}: {reason}" for name, reason in failed.items()))
        write_summary(output, self.summary(delivered, time.perf_counter() - started))

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

    def deliver(self, measurement: Measurement, log: MetricsLog) -> dict[str, Any]:
        """Measure one checkpoint, write its part of the deliverable, and return what is said of it."""
        name, began = measurement.name, time.perf_counter()
        with measurement.at_work(self.job.provenance.snapshot):
            report, seconds = self.measure(measurement, log)
            summary = {
                "object": name,
                "format": "megatron"
                if isinstance(self.recipe.checkpoints[name], MegatronCheckpoint)
                else "huggingface",
                "metrics": dict(report.content["metrics"]),
                "refused": report.content["refused"],
                "seconds": seconds,
                "wall_seconds": round(time.perf_counter() - began, 3),
                **self.how(),
            }
            envelope = enveloped(report, self.job, measurement.part.recipe_fingerprint, self.inputs[name])
            measurement.write(report, envelope, summary)
        return summary

    def measure(self, measurement: Measurement, log: MetricsLog) -> tuple[Report, dict[str, float]]:
        """Run all suites on one checkpoint; returns its report, and the seconds of each suite."""
        name = measurement.name
        self.work.at(f"{name}: open", self.steps)
        model = open_model(
            self.inputs[name],
            name=name,
            device=self.device,
            dtype=self.recipe.dtype,
            expected=self.recipe.checkpoints[name],
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
            state=measurement.tasks,
            stop=self.stop,
            batching=self.batching,
            beat=lambda task: self.work.at(f"{name}: {task}", self.steps),
        )
        results: dict[str, SuiteResult] = {}
        refused: dict[str, str] = {}
        seconds: dict[str, float] = {}
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
            seconds[suite] = round(time.perf_counter() - began, 3)
            self.steps += 1
            log.write(
                self.steps,
                {"object": name, "suite": suite, **{f"{name}/{key}": v for key, v in result.metrics.items()}},
            )
            LOGGER.info("%s: %s in %.1f s", name, suite, seconds[suite])
        report = compose(model, self.recipe, context, results, refused)
        self.say(report)
        del model
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return report, seconds

    def suites(self, model: LanguageModel) -> tuple[str, ...]:
        """Return the recipe's suites, and the routers' health where there are routers."""
        architecture = model.architecture
        routers = ("router",) if architecture is not None and architecture.moe is not None else ()
        return (*self.recipe.suites, *routers)

    def say(self, report: Report) -> None:
        """Log the score."""
        content = report.content
        if "core8_centered_mean" in content:
            LOGGER.info(
                "%s: CORE-8 centred %+.4f ± %.4f",
                report.name,
                content["core8_centered_mean"],
                content["stderr"]["core8_centered_mean"],
            )

    def how(self) -> dict[str, Any]:
        """Return how it is measured."""
        gpus = [torch.cuda.get_device_name(self.device)] if self.device.type == "cuda" else []
        return {
            "dtype": self.recipe.dtype,
            "execution": plain(self.job.execution),
            "gpus": gpus,
            "batching": {"rows": self.batching.rows, "tokens": self.batching.tokens},
        }

    def summary(self, delivered: dict[str, dict[str, Any]], seconds: float) -> dict[str, Any]:
        """Return what is said of the job as a whole."""
        return {
            "command": self.job.command,
            "asset": self.job.asset,
            "experiment": self.job.experiment,
            "recipe_fingerprint": self.job.recipe_fingerprint,
            "objects": {
                name: {**summary, "output_dir": self.job.part(name).output_dir}
                for name, summary in delivered.items()
            },
            "wall_seconds": round(seconds, 3),
            **self.how(),
        }
