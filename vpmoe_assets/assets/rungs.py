"""The ladder from the donor to the student: a conversion for each rung, and the healing runs between them."""

from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import dagster as dg

from trainer.contract.schema.base import plain
from trainer.contract.schema.convert import ConvertRecipe, VocabularyRecipe
from trainer.contract.schema.experiment import Experiment
from vpmoe_assets.assets.distill import TRAINING_SOURCES, train, training_metadata
from vpmoe_assets.assets.making import produced_asset
from vpmoe_assets.assets.plots import layer_profile
from vpmoe_assets.assets.presentation import table
from vpmoe_assets.build import Build, Built, Published
from vpmoe_assets.checks import rungs as checks

RUNGS = {
    "qwen3_0_6b_o200k": """
The donor with the student's vocabulary: o200k rows in place of Qwen3's.

mergekit's tokensurgeon makes the rows. Tokens of both vocabularies keep the donor's row bit for bit, the
others are rebuilt by the method of the experiment, rows without a token are the mean row. Everything else is
the donor's, in Hugging Face format.
""",
    "vpdense0_5_28": """
The donor in the student's shapes, still with the donor's attention: heads pooled, FFN cut.

Query and key-value heads are averaged in pools, their output columns summed, the QKV matrix interleaved by
query group; the FFN keeps its largest neurons under squared ReLU, its down projection refitted on calibration
text. RoPE, full attention, no sinks, no value residual.
""",
    "vpdense_28": """
The dense student with its real attention, at the donor's depth.

Local layers take tensor-product attention fitted to the dense projections by alternating least squares, with
rotary frequencies that can learn; global layers take linear position biases. Sinks and value residuals start
where they barely change the function.
""",
    "vpdense_80": """
The dense student at full depth: whole blocks of four layers inserted, the function unchanged.

A new layer copies the layer in the same place of the block before it, with zero output projections, so that
logits equal the parent's bit for bit and gradients reach it at once.
""",
    "vpmoe": """
The student: each dense FFN becomes a shared expert and routed experts.

The shared expert is the dense FFN itself; routed experts are slices of it with noise, behind a gain. At gain
0 the logits equal the parent's bit for bit, while the routed experts already get gradients.
""",
}
"""What each rung is."""

_HEALED = """
`{rung}` after a short training run on text and conversations.

It brings back what the conversion lost{phases}. The loss curve is drawn while it trains; `run/` keeps the
resume checkpoints.
"""

_COMMON = (
    "trainer/checkpoints/format.py",
    "trainer/contract/geometry.py",
    "trainer/contract/layers.py",
    "trainer/contract/pattern.py",
    *(f"trainer/surgery/{name}.py" for name in ("tensorfile", "tensors", "weights")),
)
_CALIBRATED = (
    "trainer/contract/fusions.py",
    "trainer/contract/words.py",
    "trainer/data",
    "trainer/model",
    *(f"trainer/surgery/{name}.py" for name in ("calibration", "streams")),
)
_STEP_SOURCES: dict[str, tuple[str, ...]] = {
    "vocabulary": (
        "trainer/contract/donor.py",
        *(f"trainer/surgery/{name}.py" for name in ("vocabulary", "tokens", "donor")),
    ),
    "vpdense": (
        *_CALIBRATED,
        "trainer/contract/donor.py",
        *(f"trainer/surgery/{name}.py" for name in ("vpdense", "donor", "ffn", "refit")),
    ),
    "morph": (*_CALIBRATED, "trainer/surgery/morph.py", "trainer/surgery/als.py"),
    "expand": ("trainer/contract/depth.py", "trainer/surgery/expand.py"),
    "upcycle": tuple(f"trainer/surgery/{name}.py" for name in ("upcycle", "expand", "ffn")),
}
"""Files whose code decides a step's bytes."""


def rung_assets(experiment: Experiment) -> list[dg.AssetsDefinition]:
    """Return the `rungs` group of an experiment: those rungs that it says how to make."""
    assets = []
    for rung, settings in experiment.rungs.items():
        if settings.surgery is not None:
            assets.append(_conversion(experiment, rung))
            if getattr(settings, "healing", None) is not None:
                assets.append(_healing(experiment, rung))
    return assets


def _conversion(experiment: Experiment, rung: str) -> dg.AssetsDefinition:
    recipe = experiment.convert_recipe(rung)
    wanted = (getattr(recipe, key, None) for key in ("source", "vocabulary", "text"))

    @produced_asset(
        experiment,
        group="rungs",
        kinds={"huggingface" if isinstance(recipe, VocabularyRecipe) else "pytorch", "safetensors"},
        recipe=plain(recipe),
        sources=(*_COMMON, *_STEP_SOURCES[recipe.step]),
        checks=checks.conversion_checks(recipe),
        metadata=_conversion_metadata,
        external=_tool_version if isinstance(recipe, VocabularyRecipe) else None,
        seed=experiment.seed,
        trains=True,
        pool=None,
        name=rung,
        description=RUNGS[rung].strip(),
        inputs=[name for name in wanted if name is not None],
    )
    def rung_asset(build: Build, **inputs: Published) -> Built:
        return convert(build, recipe, inputs)

    return rung_asset


def _healing(experiment: Experiment, rung: str) -> dg.AssetsDefinition:
    recipe = experiment.train_recipe(f"{rung}_healed")
    text = ["healing_text_v1"] if recipe.harmony_fraction < 1 else []
    conversations = ["synth_kd_v1"] if recipe.harmony_fraction > 0 else []
    phases = ": first its new layers alone, then all of them" if recipe.new_layers_only_steps else ""

    @produced_asset(
        experiment,
        group="rungs",
        kinds={"pytorch", "wandb"},
        recipe=plain(recipe),
        sources=TRAINING_SOURCES,
        checks=[checks.loss_not_diverged],
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


def convert(build: Build, recipe: ConvertRecipe, inputs: Mapping[str, Published]) -> Built:
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
    )


def _conversion_metadata(item: Published) -> Mapping[str, Any]:
    run, layers = item.directory / "run", item.record.details["layers"]
    shown: dict[str, Any] = {"log": dg.MetadataValue.path(run / "log.txt")}
    if layers:
        shown["layers"] = table(layers)
        if (plot := layer_profile(layers)) is not None:
            shown["profile"] = dg.MetadataValue.md(plot)
    return shown


def _tool_version() -> Mapping[str, str]:
    """Return the release of the program, another project's, that makes the rows: part of how."""
    return {"external:mergekit": version("mergekit")}
