"""The dense student at full depth: whole blocks of four layers inserted, the function unchanged.

A new layer copies the layer in the same place of the block before it, with zero output projections, so that
logits equal the parent's bit for bit and gradients reach it at once.
"""

from trainer.contract.schema.rungs.expand import ExpandRecipe
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.rungs import measured
from vpmoe_assets.rung import RungAsset


def checks(recipe: ExpandRecipe) -> list[Check]:
    """Return the checks of the rung."""
    return [
        measured("logits_bit_identical", "The deeper model's logits are its parent's bits.", blocking=True)
    ]


RUNG = RungAsset(checks=checks)
