"""The ladder from the donor to the student: a conversion for each rung, and the healing runs between them."""

from collections.abc import Mapping
from typing import Any

import dagster as dg

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import Experiment
from trainer.contract.schema.rungs.rung import ConversionRecipe
from trainer.contract.status import LOG_NAME
from vpmoe_assets.assets.curves import training_metadata
from vpmoe_assets.assets.distill import train
from vpmoe_assets.assets.plots import drawn_once, layer_profile
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.assets.produced import produced_asset
from vpmoe_assets.assets.step import Produced
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import rungs as checks
from vpmoe_assets.checks.check import Check
from vpmoe_assets.codebase.words import job_roots
from vpmoe_assets.rung import load_rung

_HEALED = """
`{rung}` after a short training run on text and conversations.

It brings back what the conversion lost{phases}. The loss curve is drawn while it trains; `run/` keeps the
resume checkpoints.
"""


def rung_assets(experiment: Experiment) -> list[Produced]:
    """Return the `rungs` group of an experiment: those rungs that it says how to make."""
    assets = []
    for rung, settings in experiment.rungs.items():
        if settings.surgery is not None:
            assets.append(_conversion(experiment, rung))
            if getattr(settings, "healing", None) is not None:
                assets.append(_healing(experiment, rung))
    return assets


def _conversion(experiment: Experiment, rung: str) -> Produced:
    recipe = experiment.convert_recipe(rung)
    shown, description = load_rung(recipe.step)

    @produced_asset(
        experiment,
        group="rungs",
        kinds=set(shown.kinds),
        recipe=plain(recipe),
        roots=job_roots("convert", plain(recipe)),
        checks=conversion_checks(recipe),
        metadata=_conversion_metadata,
        seed=experiment.seed,
        trains=True,
        pool=None,
        name=rung,
        description=description,
        inputs=experiment.convert_inputs(rung),
    )
    def rung_asset(build: Build, **inputs: Published) -> Built:
        return convert(build, recipe, inputs)

    return rung_asset


def conversion_checks(recipe: ConversionRecipe) -> list[Check]:
    """Return the checks of a rung that is made by a conversion."""
    rung, _ = load_rung(recipe.step)
    return rung.checks(recipe)


def _healing(experiment: Experiment, rung: str) -> Produced:
    recipe = experiment.train_recipe(f"{rung}_healed")
    text = ["healing_text_v1"] if recipe.harmony_fraction < 1 else []
    conversations = ["synth_kd_v1"] if recipe.harmony_fraction > 0 else []
    phases = ": first its new layers alone, then all of them" if recipe.new_layers_only_steps else ""

    @produced_asset(
        experiment,
        group="rungs",
        kinds={"pytorch", "wandb"},
        recipe=plain(recipe),
        roots=job_roots("train", plain(recipe)),
        checks=[
            checks.weights_complete(recipe.architecture, recipe.training.dtype),
            checks.loss_not_diverged,
        ],
        metadata=training_metadata,
        seed=experiment.seed,
        trains=True,
        name=f"{rung}_healed",
        description=_HEALED.format(rung=rung, phases=phases).strip(),
        inputs=[rung, *text, *conversations],
    )
    def healed_asset(build: Build, **inputs: Published) -> Built:
        return train(build, inputs, verify_resume=False)

    return healed_asset


def convert(build: Build, recipe: ConversionRecipe, inputs: Mapping[str, Published]) -> Built:
    """Run a conversion in the work area and return what its summary says."""
    result = build.run_job("convert", inputs, alone=True)
    summary = result.summary
    shape = summary["provenance"]["student_spec"]
    return Built(
        metrics={
            "parameters": summary["parameters"],
            "num_layers": shape["num_layers"],
            "hidden_size": shape["hidden_size"],
            "vocab_size": shape["vocab_size"],
            "convert_seconds": summary["wall_seconds"],
            "peak_rss_bytes": summary["peak_rss_bytes"],
        },
        details={**summary["provenance"], **summary["details"], "layers": summary["layers"]},
        execution={**result.execution, "gpus": list(result.devices)},
        attempts=result.attempts,
    )


def _conversion_metadata(item: Published) -> Mapping[str, Any]:
    run, layers = item.directory / "run", item.record.details["layers"]
    shown: dict[str, Any] = {"log": dg.MetadataValue.path(run / LOG_NAME)}
    if layers:
        shown["layers"] = table(layers)
        if (plot := drawn_once(item, "profile", lambda: layer_profile(layers))) is not None:
            shown["profile"] = dg.MetadataValue.md(plot)
    return shown
