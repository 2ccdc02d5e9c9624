"""The student: each dense FFN becomes a shared expert and routed experts.

The shared expert is the dense FFN itself; routed experts are slices of it with noise, behind a gain. At gain
0 the logits equal the parent's bit for bit, while the routed experts already get gradients.
"""

from trainer.contract.layers import dense_ffn_hidden_size, moe_layers
from trainer.contract.parameters import layer_and_part, parameters
from trainer.contract.schema.rungs.upcycle import UpcycleRecipe
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.rungs import copied, measured, weights_complete
from vpmoe_assets.rung import RungAsset


def checks(recipe: UpcycleRecipe) -> list[Check]:
    """Return the checks of the rung."""
    exact = recipe.surgery.routed_gain == 0.0
    name = "logits_bit_identical" if exact else "logits_finite"
    says = "The logits are the parent's bits." if exact else "All logits on a fixed batch are finite."
    pairs, zeros = origins(recipe)
    return [
        weights_complete(recipe.architecture, recipe.dtype),
        copied(
            "parent_kept",
            "Everything but the experts has the parent's numbers; at gain 0 the routed ones give nothing.",
            recipe.source,
            pairs,
            zeros,
        ),
        measured(name, says, blocking=True),
        measured("router_entropy", "Fresh routers spread tokens over the experts.", blocking=False),
    ]


def origins(recipe: UpcycleRecipe) -> tuple[dict[str, str], list[str]]:
    """Return the parent's tensor that each tensor is copied from, and the tensors that are zero."""
    arch, closed = recipe.architecture, recipe.surgery.routed_gain == 0.0
    routed = set(moe_layers(arch))
    cut = dense_ffn_hidden_size(arch) != dense_ffn_hidden_size(recipe.parent)
    pairs, zeros = {}, []
    for parameter in parameters(arch):
        layer, part = layer_and_part(parameter.name)
        if layer in routed and part.startswith("mlp."):
            shared = part.removeprefix("mlp.shared_experts.")
            if shared != part and (closed or shared != "linear_fc2.weight"):
                pairs[parameter.name] = f"decoder.layers.{layer - 1}.mlp.{shared}"
            elif part == "mlp.experts.weight2" and closed:
                zeros.append(parameter.name)
        elif not (cut and layer == 1 and part.startswith("mlp.")):
            pairs[parameter.name] = parameter.name
    return pairs, zeros


RUNG = RungAsset(checks=checks)
