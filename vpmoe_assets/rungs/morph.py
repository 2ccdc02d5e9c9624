"""The dense student with its real attention, at the donor's depth.

Local layers take tensor-product attention fitted to the dense projections by alternating least squares, with
rotary frequencies that can learn; global layers take linear position biases. Sinks and value residuals start
where they barely change the function.
"""

from collections.abc import Mapping

from trainer.contract.parameters import parameters
from trainer.contract.schema.rungs.morph import MorphRecipe
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.checks.rungs import copied, distance, measured, weights_complete
from vpmoe_assets.rung import RungAsset
from vpmoe_assets.verdict import Verdict


def checks(recipe: MorphRecipe) -> list[Check]:
    """Return the checks of the rung."""
    theirs = {parameter.name for parameter in parameters(recipe.parent)}
    kept = [parameter.name for parameter in parameters(recipe.architecture) if parameter.name in theirs]
    return [
        weights_complete(recipe.architecture, recipe.dtype),
        copied(
            "rest_copied",
            "Everything but the new attention has the parent's numbers.",
            recipe.source,
            dict(zip(kept, kept, strict=True)),
        ),
        measured("finite_logits", "All logits on the calibration text are finite.", blocking=True),
        measured("better_than_guessing", "Cross-entropy on it is below ln V.", blocking=False),
        tpa_fit,
        distance(
            "distance_to_parent", "cosine_to_parent", "How far each layer's output is from the parent's."
        ),
    ]


@check("tpa_fit", blocking=False)
def tpa_fit(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Fitted tensor products are closer to the dense projections than zero is, in every layer."""
    rows = item.summary["layers"]
    errors = {
        projection: [
            row[f"{projection}_relative_mse"]
            for row in rows
            if row.get(f"{projection}_relative_mse") is not None
        ]
        for projection in ("q", "k", "v")
    }
    means = {name: sum(values) / len(values) for name, values in errors.items() if values}
    if not means:
        return Verdict(True, "no projection was fitted; the factors are random", {})
    worst = max(max(values) for values in errors.values() if values)
    shown = ", ".join(f"{name} {mean:.3f}" for name, mean in means.items())
    return Verdict(
        worst < 1.0,
        f"mean squared error relative to predicting zero: {shown}; worst layer {worst:.3f}",
        {**means, "worst": worst},
    )


RUNG = RungAsset(checks=checks)
