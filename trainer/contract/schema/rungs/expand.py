"""Rung `vpdense_80`: the dense student at full depth."""

from typing import ClassVar, Literal, Self

from pydantic import model_validator

from trainer.contract.depth import BLOCK_LAYERS, inserted_layers, layer_origins
from trainer.contract.pattern import LayerKind, layer_pattern
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import Frozen
from trainer.contract.schema.rungs.rung import (
    ConversionRecipe,
    DenseRung,
    RungConfig,
    RungRecipe,
    refuse_changes,
)


class DepthSurgery(Frozen):
    """28 → 80 layers by inserting whole blocks whose residual branches are zero."""

    init_new_layers: Literal["zero_residual"]


class ExpandRecipe(RungRecipe):
    """`vpdense_28` → `vpdense_80`: whole blocks inserted, the function unchanged."""

    step: Literal["expand"] = "expand"
    surgery: DepthSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_changes(self, {"model.num_layers"})
        if self.parent.moe is not None:
            raise ValueError("parent.moe: found experts; depth is expanded while every FFN is dense")
        ours, theirs = _kinds(self.architecture), _kinds(self.parent)
        origins = layer_origins(self.parent.model.num_layers, self.architecture.model.num_layers)
        for number, origin in enumerate(origins, start=1):
            if ours[number - 1] != theirs[origin.source - 1]:
                raise ValueError(
                    f"layer {number} would be {ours[number - 1]} and take the tensors of layer "
                    f"{origin.source}, which is {theirs[origin.source - 1]}; the attention pattern must "
                    f"repeat every block of {BLOCK_LAYERS} layers"
                )
        return self


class DeepRung(DenseRung):
    """Rung `vpdense_80`: the student's depth."""

    RECIPE: ClassVar[type[ConversionRecipe]] = ExpandRecipe

    surgery: DepthSurgery | None = None

    def new_layers(self, parent: RungConfig) -> tuple[int, ...]:
        """1-based numbers of the layers that the step inserts."""
        return inserted_layers(parent.model.num_layers, self.model.num_layers)


def _kinds(architecture: Architecture) -> tuple[LayerKind, ...]:
    attention = architecture.attention
    return layer_pattern(
        architecture.model.num_layers, attention.window_size, attention.window_attn_skip_freq
    )
