"""The `evaluate` command: every checkpoint of a job through every suite, in one start.

Each checkpoint is measured for itself and delivered as soon as it is: what else the job measures changes
nothing in its report, and neither does a checkpoint that cannot be measured.
"""

import gc
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.evaluate import EvaluateRecipe, MegatronCheckpoint
from trainer.contract.schema.job import Job
from trainer.errors import EvaluationError, TokenizerMismatchError
from trainer.evaluate.beside import Tell, measure_beside, processes, share_threads
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


def evaluate(
    job: Job,
    work: WorkDir,
    stop: StopRequest,
    *,
    batching: Batching | None = None,
    count: int | None = None,
) -> None:
    """Measure the checkpoints of a job, each into its own part of the deliverable.

    A task that an earlier start of the same job finished is not done again. Weights & Biases is not used.

    Args:
        job: An `evaluate` job.
        work: Its work directory.
        stop: Asks for a clean stop.
        batching: How much to compute at once; by default what suits the device.
        count: Processes that measure beside each other; by default what suits the device.

    Raises:
        Interrupted: Stopped as asked; measured checkpoints and finished tasks are kept.
        ConfigError: The job lacks an input, or brings a checkpoint that its recipe does not name.
        EvaluationError: Checkpoints cannot be measured; all others are.
        JobError: A process that measured was ended.
    """
    started = time.perf_counter()
    recipe = job.evaluate_recipe()
    require_commit(job)
    _check_inputs(job, recipe)
    names = list(recipe.checkpoints)
    count = processes(job, names, count)
    execution = job.execution
    output = Path(job.output_dir)
    output.mkdir(parents=True, exist_ok=True)

    def measure(given: Iterator[str], tell: Tell) -> None:
        with session(execution.device, tp=execution.tp, ep=execution.ep, dp=execution.dp) as layout:
            share_threads(count)
            Run(job, recipe, stop, layout.device, batching, tell).complete(given)

    heard = _Heard(work)
    try:
        if count > 1:
            measure_beside(names, count, measure, heard.hear, stop)
        else:
            measure(iter(names), heard.hear)
    finally:
        heard.log.close()
    if heard.failed:
        raise EvaluationError("; ".join(f"{n}: {heard.failed[n]}" for n in names if n in heard.failed))
    write_summary(output, _summary(job, recipe, heard.delivered, batching, time.perf_counter() - started))


class _Heard:
    """What is known of the whole job, as measuring processes tell it."""

    def __init__(self, work: WorkDir) -> None:
        self.work = work
        self.log = MetricsLog(work.metrics)
        self.steps = 0
        self.delivered: dict[str, dict[str, Any]] = {}
        self.failed: dict[str, str] = {}

    def hear(self, kind: str, value: Any) -> None:
        """Take note of what is told: `at`, `measured`, `delivered` or `failed`."""
        if kind == "at":
            self.work.at(value, self.steps)
        elif kind == "measured":
            self.steps += 1
            self.log.write(self.steps, value)
        elif kind == "delivered":
            name, summary = value
            self.delivered[name] = summary
        else:
            name, reason = value
            self.failed[name] = reason


class Run:
    """One process that measures checkpoints.

    It tells where it is (`at`, a phase), of each suite (`measured`, its metrics), and of each checkpoint that
    it is `delivered` (its name and summary) or `failed` (its name and the reason).
    """

    def __init__(
        self,
        job: Job,
        recipe: EvaluateRecipe,
        stop: StopRequest,
        device: torch.device,
        batching: Batching | None,
        tell: Tell,
    ) -> None:
        self.job, self.recipe, self.stop, self.device, self.tell = job, recipe, stop, device, tell
        self.batching = Batching.default(device.type) if batching is None else batching
        self.inputs = {name: Path(given.path) for name, given in job.inputs.items()}
        self.digests = {name: given.digest for name, given in job.inputs.items()}

    def complete(self, names: Iterator[str]) -> None:
        """Measure and deliver checkpoints."""
        for name in names:
            try:
                self.tell("delivered", (name, self.deliver(Measurement(name, self.job.part(name)))))
            except ConfigError:  # it is the job's, not this checkpoint's
                raise
            except ValueError as error:
                LOGGER.error("%s cannot be measured: %s", name, error)
                self.tell("failed", (name, str(error)))

    def deliver(self, measurement: Measurement) -> dict[str, Any]:
        """Measure one checkpoint, write its part of the deliverable, and return what is said of it."""
        name, began = measurement.name, time.perf_counter()
        with measurement.at_work(self.job.provenance.snapshot):
            report, seconds = self.measure(measurement)
            summary = {
                "object": name,
                "format": "megatron"
                if isinstance(self.recipe.checkpoints[name], MegatronCheckpoint)
                else "huggingface",
                "metrics": dict(report.content["metrics"]),
                "refused": report.content["refused"],
                "seconds": seconds,
                "wall_seconds": round(time.perf_counter() - began, 3),
                **_how(self.job, self.recipe, self.batching, self.device),
            }
            envelope = enveloped(report, self.job, measurement.part.recipe_fingerprint, self.inputs[name])
            measurement.write(report, envelope, summary)
        return summary

    def measure(self, measurement: Measurement) -> tuple[Report, dict[str, float]]:
        """Run all suites on one checkpoint; returns its report, and the seconds of each suite."""
        name = measurement.name
        self.tell("at", f"{name}: open")
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
            beat=lambda task: self.tell("at", f"{name}: {task}"),
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
            metrics = {f"{name}/{key}": value for key, value in result.metrics.items()}
            self.tell("measured", {"object": name, "suite": suite, **metrics})
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


def _check_inputs(job: Job, recipe: EvaluateRecipe) -> None:
    """Refuse checkpoints that would silently be left out.

    Raises:
        ConfigError: An input is a checkpoint and the recipe does not name it.
    """
    forgotten = [
        name
        for name, given in job.inputs.items()
        if name not in recipe.checkpoints and is_checkpoint(Path(given.path))
    ]
    if forgotten:
        raise ConfigError(
            f"inputs: {', '.join(forgotten)} hold weights, but recipe.checkpoints names only "
            f"{', '.join(recipe.checkpoints)}; name them there or leave them out"
        )


def _how(job: Job, recipe: EvaluateRecipe, batching: Batching, device: torch.device) -> dict[str, Any]:
    """Return how it is measured."""
    return {
        "dtype": recipe.dtype,
        "execution": plain(job.execution),
        "gpus": [torch.cuda.get_device_name(device)] if device.type == "cuda" else [],
        "batching": {"rows": batching.rows, "tokens": batching.tokens},
    }


def _summary(
    job: Job,
    recipe: EvaluateRecipe,
    delivered: dict[str, dict[str, Any]],
    batching: Batching | None,
    seconds: float,
) -> dict[str, Any]:
    """Return what is said of the job as a whole."""
    device = torch.device(job.execution.device)
    return {
        "command": job.command,
        "asset": job.asset,
        "experiment": job.experiment,
        "recipe_fingerprint": job.recipe_fingerprint,
        "objects": {
            name: {**delivered[name], "output_dir": job.part(name).output_dir} for name in recipe.checkpoints
        },
        "wall_seconds": round(seconds, 3),
        **_how(job, recipe, batching or Batching.default(device.type), device),
    }
