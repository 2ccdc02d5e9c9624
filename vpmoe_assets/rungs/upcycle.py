"""The student: each dense FFN becomes a shared expert and routed experts.

The shared expert is the dense FFN itself; routed experts are slices of it with noise, behind a gain. At gain
0 the logits equal the parent's bit for bit, while the routed experts already get gradients.
"""

from trainer.contract.schema.rungs.upcycle import UpcycleRecipe
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.rungs import measured
from vpmoe_assets.rung import RungAsset


def checks(recipe: UpcycleRecipe) -> list[Check]:
    """Return the checks of the rung."""
    exact = recipe.surgery.routed_gain == 0.0
    name = "logits_bit_identical" if exact else "logits_finite"
    says = "The logits are the parent's bits." if exact else "All logits on a fixed batch are finite."
    return [
        measured(name, says, blocking=True),
        measured("router_entropy", "Fresh routers spread tokens over the experts.", blocking=False),
    ]


RUNG = RungAsset(checks=checks)
