"""Rung `vpmoe`: the student."""

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.schema.architecture import Architecture, MoeConfig
from trainer.contract.schema.base import Frozen, NonNegativeFloat
from trainer.contract.schema.rungs.rung import (
    ConversionRecipe,
    RungConfig,
    RungRecipe,
    refuse,
    refuse_changes,
)


class MoeSurgery(Frozen):
    """Dense FFN → shared expert and routed experts.

    Attributes:
        routed_gain: Gain on the routed experts' output; 0 keeps the function bit for bit.
        layer1: A first layer whose width differs from the parent's is refused (`copy`) or cut (`shrink`).
    """

    init_experts: Literal["copy_plus_noise"]
    expert_noise: NonNegativeFloat
    routed_gain: NonNegativeFloat
    init_router: Literal["near_uniform"]
    layer1: Literal["copy", "shrink"] = "copy"


class UpcycleRecipe(RungRecipe):
    """`vpdense_80` → `vpmoe`: each dense FFN becomes a shared expert and routed ones."""

    step: Literal["upcycle"] = "upcycle"
    surgery: MoeSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_changes(self, {"moe", "model.ffn_hidden_size", "model.dense_ffn_hidden_size"})
        moe = self.architecture.moe
        if self.parent.moe is not None or moe is None:
            raise ValueError("moe: upcycling needs a dense parent and a result with a moe table")
        width, routed = _dense_width(self.parent), self.architecture.model.ffn_hidden_size
        first = _dense_width(self.architecture)
        problems = []
        if not moe.shared_expert or moe.shared_expert_size != width:
            problems.append(
                f"moe.shared_expert = {moe.shared_expert} of size {moe.shared_expert_size}, but the parent's "
                f"FFN is {width} wide and becomes the shared expert; they must be equal"
            )
        if width % routed:
            problems.append(
                f"model.ffn_hidden_size = {routed} does not divide the parent's {width} neurons into slices"
            )
        if moe.first_layer_dense and first > width:
            problems.append(
                f"model.dense_ffn_hidden_size = {first} is wider than the parent's FFN of {width}"
            )
        if moe.first_layer_dense and first < width and self.surgery.layer1 != "shrink":
            problems.append(
                f"model.dense_ffn_hidden_size = {first} is narrower than the parent's FFN of {width}; set "
                f"it to {width} to keep layer 1, or surgery.layer1 = 'shrink' to cut it"
            )
        refuse(problems)
        return self


class MoeRung(RungConfig):
    """Rung `vpmoe`: the student."""

    RECIPE: ClassVar[type[ConversionRecipe]] = UpcycleRecipe

    moe: MoeConfig
    surgery: MoeSurgery | None = None
    healing: Annotated[None, Field(description="the student's healing run is stage 1")] = None


def _dense_width(architecture: Architecture) -> int:
    return architecture.model.dense_ffn_hidden_size or architecture.model.ffn_hidden_size
