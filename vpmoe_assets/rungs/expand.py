"""The dense student at full depth: whole blocks of four layers inserted, the function unchanged.

A new layer copies the layer in the same place of the block before it, with zero output projections, so that
logits equal the parent's bit for bit and gradients reach it at once.
"""

from trainer.contract.depth import layer_origins
from trainer.contract.parameters import layer_and_part, parameters
from trainer.contract.schema.rungs.expand import ExpandRecipe
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.rungs import copied, measured, weights_complete
from vpmoe_assets.rung import RungAsset

_TO_THE_STREAM = ("self_attention.linear_proj.", "mlp.linear_fc2.")
"""What a layer adds to the residual stream passes through these."""


def checks(recipe: ExpandRecipe) -> list[Check]:
    """Return the checks of the rung."""
    pairs, zeros = origins(recipe)
    return [
        weights_complete(recipe.architecture, recipe.dtype),
        copied(
            "layers_copied",
            "Every layer has the parent's numbers; a new one adds nothing to the residual stream.",
            recipe.source,
            pairs,
            zeros,
        ),
        measured("logits_bit_identical", "The deeper model's logits are its parent's bits.", blocking=True),
    ]


def origins(recipe: ExpandRecipe) -> tuple[dict[str, str], list[str]]:
    """Return the parent's tensor that each tensor is copied from, and the tensors that are zero.

    Layer 1 has no value residual, so its copies have one of their own.
    """
    theirs = {parameter.name for parameter in parameters(recipe.parent)}
    sources = layer_origins(recipe.parent.model.num_layers, recipe.architecture.model.num_layers)
    pairs, zeros = {}, []
    for parameter in parameters(recipe.architecture):
        layer, part = layer_and_part(parameter.name)
        if layer is None:
            pairs[parameter.name] = parameter.name
            continue
        origin = sources[layer - 1]
        source = f"decoder.layers.{origin.source - 1}.{part}"
        if origin.inserted and part.startswith(_TO_THE_STREAM):
            zeros.append(parameter.name)
        elif source in theirs:
            pairs[parameter.name] = source
    return pairs, zeros


RUNG = RungAsset(checks=checks)
