"""Distillation stages: training runs of the student."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import orjson

from trainer.contract.assets import TEACHER, TEACHER_TOPK
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.status import METRICS_NAME
from vpmoe_assets.assets.curves import distillation_metadata, training_metadata
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.assets.topk import teacher_topk
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import distillation, training
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.rungs import loss_not_diverged, weights_complete
from vpmoe_assets.codebase.words import job_roots

_LAST_OF_ROLLOUTS = (
    "rollouts/teacher_gap/rollout_reasoning",
    "rollouts/teacher_gap/rollout_final",
    "rollouts/valid_rate",
    "rollouts/end_rate",
    "rollouts/length",
    "rollouts/dropped_total",
)


def distill_assets(experiment: Experiment) -> list[Produced]:
    """Return the `distill` group of an experiment: its stages, and the store between the first two."""
    made = [_stage1(experiment)]
    if experiment.stages.teacher_topk is not None:
        made.append(teacher_topk(experiment))
    if experiment.stages.vpmoe_stage2 is not None:
        made.append(_stage2(experiment))
    if experiment.stages.vpmoe_stage3 is not None:
        made.append(_stage3(experiment))
    return made


def _stage1(experiment: Experiment) -> Produced:
    parent = ["vpmoe"] if experiment.stages.vpmoe_stage1.init == "checkpoint" else []

    @_stage(experiment, "vpmoe_stage1", [*parent, "synth_kd_v1"])
    def vpmoe_stage1(build: Build, **inputs: Published) -> Built:
        """Stage 1, warm start: span-normalised cross-entropy on SYNTH conversations.

        The student starts from the rung `vpmoe`, or from a seeded initialisation where the experiment says
        so (`bench`). The loss curve is drawn while it trains; the checkpoint is safetensors by Megatron
        parameter name, and the resume checkpoints are kept in `run/`.
        """
        return train(build, inputs)

    return vpmoe_stage1


def _stage2(experiment: Experiment) -> Produced:
    @_stage(experiment, "vpmoe_stage2", ["vpmoe_stage1", "synth_kd_v1", TEACHER_TOPK])
    def vpmoe_stage2(build: Build, **inputs: Published) -> Built:
        """Stage 2, offline distillation: conversations that the teacher has scored, mixed with plain ones.

        On scored tokens the divergence from the stored top of the teacher's distribution is mixed with the
        cross-entropy; plain conversations are trained as in stage 1. Its curves are drawn while it trains.
        """
        return _with_last(build, train(build, inputs), ("heldout_kl/scored", "heldout_loss/scored"))

    return vpmoe_stage2


def _stage3(experiment: Experiment) -> Produced:
    source = experiment.sources.teacher
    assert source is not None  # or the experiment would have been refused

    @_stage(
        experiment,
        "vpmoe_stage3",
        ["vpmoe_stage2", "synth_kd_v1", TEACHER],
        # Its objective is the teacher's word on the student's answers, not the loss of stored ones.
        checks=[loss_not_diverged, distillation.harmony_validity, distillation.buffer_health],
    )
    def vpmoe_stage3(build: Build, **inputs: Published) -> Built:
        """Stage 3, on-policy distillation: the student answers, the teacher judges every token of it.

        What should come closer to zero is `teacher − student`, the log-probability of the answers under the
        teacher less that under the student, while stored conversations keep `valid_loss` down. Of the loss on
        answers only the gradient means something: its value may be below zero. A logical clock decides which
        weights write which answers, whatever the speed of the parts; they are kept in `run/rollouts/`.
        """
        from vpmoe_assets.donors.teacher import where

        return _with_last(build, train(build, inputs, execution=where(source)), _LAST_OF_ROLLOUTS)

    return vpmoe_stage3


def _stage(
    experiment: Experiment,
    asset: str,
    inputs: Sequence[str],
    checks: Sequence[Check] = (training.heldout_loss_fell,),
) -> Callable[[Callable[..., Built]], Produced]:
    """Return what all stages have in common, around the function of one.

    Args:
        experiment: The experiment.
        asset: Of the stage.
        inputs: Of its job.
        checks: Further ones.
    """
    recipe = experiment.train_recipe(asset)
    return produced_asset(
        experiment,
        group="distill",
        kinds={"pytorch", "wandb"},
        recipe=plain(recipe),
        roots=job_roots("train", plain(recipe)),
        checks=[
            weights_complete(recipe.architecture, recipe.training.dtype),
            training.resume_drift,
            training.router_alive,
            *checks,
        ],
        metadata=training_metadata if asset == "vpmoe_stage1" else distillation_metadata,
        seed=experiment.seed,
        trains=True,
        inputs=inputs,
    )


def train(
    build: Build,
    inputs: Mapping[str, Published],
    *,
    verify_resume: bool = True,
    execution: Mapping[str, Any] | None = None,
) -> Built:
    """Run a training job in the work area and return what its summary says.

    Args:
        build: Of the asset.
        inputs: Of the job.
        verify_resume: Repeat the last steps from their checkpoint; for the assets whose check asks for it.
        execution: Keys of the job's `execution` beside the resource's settings.
    """
    result = build.run_job("train", inputs, verify_resume=verify_resume, execution=execution)
    summary = result.summary
    model = build.recipe["architecture"]["model"]
    return Built(
        metrics={
            "parameters": summary["parameters"],
            "num_layers": model["num_layers"],
            "hidden_size": model["hidden_size"],
            "loss": summary["loss_last"],
            "valid_loss": summary["heldout_loss_end"],
            "valid_loss_start": summary["heldout_loss_start"],
            "steps": summary["steps"],
            "fill_ratio": summary["fill_ratio"],
            "train_seconds": summary["train_seconds"],
            "resume_drift": summary["resume_drift"],
        },
        details={
            name: summary[name]
            for name in ("tokens", "samples", "heldout", "router", "layout")
            if name in summary  # a dense model has no router
        },
        execution={**result.execution, "gpus": list(result.devices), "resumed_from": result.resumed_from},
        attempts=result.attempts,
    )


def _with_last(build: Build, built: Built, keys: Sequence[str]) -> Built:
    """Add to a run's metrics what it logged last under some keys, where it did."""
    last: dict[str, Any] = {}
    with (build.work.path / METRICS_NAME).open("rb") as lines:
        for line in lines:
            last |= orjson.loads(line)
    found = {
        key.replace("/rollout_", "/").replace("/", "_"): last[key]
        for key in keys
        if last.get(key) is not None
    }
    return replace(built, metrics={**built.metrics, **found})
