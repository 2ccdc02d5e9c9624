"""Depth expansion: whole blocks of layers inserted, each a copy whose residual branches start at zero."""

from pathlib import Path

import torch

from trainer.contract.depth import layer_origins
from trainer.contract.layers import layer_kinds
from trainer.contract.parameters import layer_and_part
from trainer.contract.schema.rungs.expand import ExpandRecipe
from trainer.model.value_residual import initial_logit
from trainer.surgery.step import Conversion, Outcome, Verdict
from trainer.surgery.tensors import LAYER
from trainer.surgery.weights import WeightsReader, WeightsWriter

ZEROED = (
    "self_attention.linear_proj.weight",
    "self_attention.linear_proj.bias",
    "mlp.linear_fc2.weight",
    "mlp.linear_fc2.bias",
)
"""What a new layer adds to the residual stream passes through these; at zero it adds nothing."""

_VALUE_RESIDUAL = "self_attention.value_residual_logit"


def convert(conversion: Conversion, out: WeightsWriter) -> Outcome:
    """Copy the parent's layers to their new places and fill the gaps.

    A new layer has the tensors of the same-position layer of the nearest old block before it, so that
    training starts from a layer that has learnt something; only the projections back into the residual
    stream are zero. Layer 1 has no value residual of its own; its copies start with a fresh one.

    Args:
        conversion: With an `ExpandRecipe`.
        out: The deeper checkpoint.
    """
    recipe = _recipe(conversion)
    origins = layer_origins(recipe.parent.model.num_layers, recipe.architecture.model.num_layers)
    with WeightsReader(conversion.source) as source:
        source.require_rung(recipe.parent, recipe.parent_dtype)
        for name, spec in out.specs.items():
            number, part = layer_and_part(name)
            if number is None:
                out.write(name, source.read(name))
                continue
            origin = origins[number - 1]
            if origin.inserted and part in ZEROED:
                out.write(name, torch.zeros(spec.shape))
            elif origin.source == 1 and number > 1 and part == _VALUE_RESIDUAL:
                model = recipe.architecture.model
                logit = initial_logit(model.value_residual_init, model.value_residual_eps)
                out.write(name, torch.tensor(logit))
            else:
                out.write(name, source.read(LAYER.format(origin.source - 1) + part))
    inserted = [number for number, origin in enumerate(origins, start=1) if origin.inserted]
    return Outcome(
        transform={
            "init_new_layers": recipe.surgery.init_new_layers,
            "layer_sources": [origin.source for origin in origins],
            "inserted_layers": inserted,
            "zeroed": list(ZEROED),
        },
        layers=[
            {
                "layer": number,
                "kind": kind,
                "parent_layer": origin.source,
                "origin": "inserted" if origin.inserted else "moved",
            }
            for number, (origin, kind) in enumerate(
                zip(origins, layer_kinds(recipe.architecture), strict=True), start=1
            )
        ],
    )


def check(conversion: Conversion, payload: Path, outcome: Outcome) -> None:
    """Compare the logits of both checkpoints on a fixed batch; they must be equal bit for bit."""
    from trainer.surgery.agreement import compare_to_parent

    agreement, changes = compare_to_parent(conversion, _recipe(conversion), payload)
    for row, change in zip(outcome.layers, changes, strict=True):
        row["residual_change"] = change
    outcome.checks["logits_bit_identical"] = Verdict(
        agreement.equal,
        f"logits over {agreement.tokens} seeded tokens equal the parent's bit for bit",
        agreement.describe(),
    )


def _recipe(conversion: Conversion) -> ExpandRecipe:
    assert isinstance(conversion.recipe, ExpandRecipe)
    return conversion.recipe
