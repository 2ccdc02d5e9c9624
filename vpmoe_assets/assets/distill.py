"""Distillation stages: training runs of the student."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import orjson

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.status import LOG_NAME, METRICS_NAME
from vpmoe_assets.assets.plots import drawn_once, loss_curve
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import training as checks
from vpmoe_assets.checks.rungs import weights_complete
from vpmoe_assets.codebase.words import job_roots


def distill_assets(experiment: Experiment) -> list[Produced]:
    """Return the `distill` group of an experiment."""
    recipe = experiment.train_recipe("vpmoe_stage1")
    parent = ["vpmoe"] if recipe.init == "checkpoint" else []

    @produced_asset(
        experiment,
        group="distill",
        kinds={"pytorch", "wandb"},
        recipe=plain(recipe),
        roots=job_roots("train", plain(recipe)),
        checks=[
            weights_complete(recipe.architecture, recipe.training.dtype),
            checks.resume_drift,
            checks.router_alive,
            checks.heldout_loss_fell,
        ],
        metadata=training_metadata,
        seed=experiment.seed,
        trains=True,
        inputs=[*parent, "synth_kd_v1"],
    )
    def vpmoe_stage1(build: Build, **inputs: Published) -> Built:
        """Stage 1, warm start: span-normalised cross-entropy on SYNTH conversations.

        The student starts from the rung `vpmoe`, or from a seeded initialisation where the experiment says
        so (`bench`). The loss curve is drawn while it trains; the checkpoint is safetensors by Megatron
        parameter name, and the resume checkpoints are kept in `run/`.
        """
        return train(build, inputs)

    return [vpmoe_stage1]


def train(build: Build, inputs: Mapping[str, Published], *, verify_resume: bool = True) -> Built:
    """Run a training job in the work area and return what its summary says.

    Args:
        build: Of the asset.
        inputs: Of the job.
        verify_resume: Repeat the last steps from their checkpoint; for the assets whose check asks for it.
    """
    result = build.run_job("train", inputs, verify_resume=verify_resume)
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


def training_metadata(item: Published) -> Mapping[str, Any]:
    """Return the loss curve of a run as a plot, and where its log is."""
    run = item.directory / "run"
    shown: dict[str, Any] = {"log": dg.MetadataValue.path(run / LOG_NAME)}
    metrics = run / METRICS_NAME
    if metrics.is_file():
        curve = drawn_once(item, "curve", lambda: loss_curve(_points(metrics)))
        shown["curve"] = dg.MetadataValue.md(curve or "")
    return shown


def _points(metrics: Path) -> list[dict[str, Any]]:
    with metrics.open("rb") as lines:
        return [orjson.loads(line) for line in lines]
