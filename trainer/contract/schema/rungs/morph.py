"""Rung `vpdense_28`: the dense student with its real attention."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from trainer.contract.schema.base import Frozen, NonNegativeFloat, PositiveInt
from trainer.contract.schema.rungs.rung import (
    ConversionRecipe,
    DenseRung,
    InputName,
    Place,
    RungRecipe,
    refuse_changes,
)


class MorphSurgery(Frozen):
    """Full causal GQA → local TPA with GRAPE, value residual and softmax offset.

    Attributes:
        tpa_init: `als` fits the factors to the parent's projections, `random` draws them afresh.
        als_sweeps: Most sweeps of a fit: a bound on its time, not what should end it.
        als_tolerance: A fit ends when a sweep lowers its error by less than this share.
    """

    tpa_init: Literal["als", "random"]
    als_sweeps: PositiveInt
    als_tolerance: NonNegativeFloat = 5e-5
    softmax_offset_init: float
    calibration_tokens: PositiveInt


class MorphRecipe(RungRecipe):
    """`vpdense0_5_28` → `vpdense_28`: the student's attention in place of the donor's.

    Attributes:
        text: Name of the job's input with calibration and check text.
    """

    step: Literal["morph"] = "morph"
    text: InputName
    surgery: MorphSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        refuse_changes(
            self,
            {"attention", "tpa", "grape"}
            | {f"model.{name}" for name in ("softmax_type", "value_residual")}
            | {f"model.value_residual_{name}" for name in ("init", "eps")},
        )
        return self


class MorphedRung(DenseRung):
    """Rung `vpdense_28`: the student's attention."""

    RECIPE: ClassVar[type[ConversionRecipe]] = MorphRecipe

    surgery: MorphSurgery | None = None

    def keys(self, place: Place) -> dict[str, Any]:
        """Return the keys of its recipe."""
        return {**place.between_rungs(), "text": "healing_text_v1"}
