"""Rung `vpdense0_5_28`: the donor in the student's shapes."""

from typing import Any, ClassVar, Literal, Self

from pydantic import model_validator

from trainer.contract.schema.base import (
    ConfigError,
    Frozen,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    plain,
)
from trainer.contract.schema.rungs.rung import (
    ConversionRecipe,
    DenseRung,
    DonorRecipe,
    InputName,
    MegatronRecipe,
    Place,
    refuse,
)


class DenseSurgery(Frozen):
    """Donor tensors → vpDense: head pooling and FFN selection.

    Attributes:
        o_proj_pool: How pooled heads' output columns combine; `sum` is exact for equal heads.
        ffn_method: `A` keeps the neurons with the largest down-projection norm; `A+lsq` then refits
            the down projection on `calibration_tokens`.
        ffn_scale: Factor on the kept down projection.
        ffn_ridge: Strength of the refit's ridge, relative to the sum of squares of each hidden activation.
    """

    o_proj_pool: Literal["sum", "mean"]
    ffn_method: Literal["A", "A+lsq"]
    ffn_scale: PositiveFloat
    ffn_ridge: NonNegativeFloat = 1e-8
    calibration_tokens: PositiveInt


class DenseRecipe(DonorRecipe, MegatronRecipe):
    """Donor → `vpdense0_5_28`: the donor's attention, heads pooled, and its FFN with ReLU².

    Attributes:
        text: Name of the job's input with calibration and check text.
    """

    step: Literal["vpdense"] = "vpdense"
    text: InputName
    surgery: DenseSurgery

    @model_validator(mode="after")
    def _check(self) -> Self:
        donor, model, attention = self.donor, self.architecture.model, self.architecture.attention
        pairs = [
            ("vocab_size", self.architecture.vocab_size, donor.vocab_size),
            ("model.num_layers", model.num_layers, donor.num_layers),
            ("model.hidden_size", model.hidden_size, donor.hidden_size),
            ("model.head_dim", model.head_dim, donor.head_dim),
            ("model.norm_epsilon", model.norm_epsilon, donor.rms_norm_eps),
            ("grape.rotary_base", self.architecture.grape.rotary_base, donor.rope_theta),
            (
                "attention.position_embedding_type",
                attention.position_embedding_type,
                "rope",
            ),
            ("model.softmax_type", model.softmax_type, "vanilla"),
            ("model.value_residual", model.value_residual, False),
            ("model.qk_layernorm", model.qk_layernorm, True),
        ]
        problems = [
            f"{key} = {found!r}, but the donor has {theirs!r}"
            for key, found, theirs in pairs
            if found != theirs
        ]
        for key, ours, theirs in (
            ("model.num_attention_heads", model.num_attention_heads, donor.num_attention_heads),
            ("model.num_query_groups", model.num_query_groups, donor.num_key_value_heads),
        ):
            if theirs % ours:
                problems.append(f"{key} = {ours} does not divide the donor's {theirs} heads into equal pools")
        if model.ffn_hidden_size > donor.intermediate_size:
            problems.append(
                f"model.ffn_hidden_size = {model.ffn_hidden_size} is wider than the donor's FFN of "
                f"{donor.intermediate_size}"
            )
        if self.architecture.moe is not None:
            problems.append("moe: the result of this step is dense")
        if self.surgery.ffn_method == "A+lsq" and not model.add_bias_linear:
            problems.append(
                "surgery.ffn_method = 'A+lsq' refits a bias; it needs model.add_bias_linear = true"
            )
        refuse(problems)
        return self


class CompatRung(DenseRung):
    """Rung `vpdense0_5_28`: the donor's attention in the student's widths."""

    RECIPE: ClassVar[type[ConversionRecipe]] = DenseRecipe
    NEEDS: ClassVar[tuple[str, ...]] = ("qwen3_0_6b",)

    surgery: DenseSurgery | None = None

    def keys(self, place: Place) -> dict[str, Any]:
        """Return the keys of its recipe: it is made from the donor with the student's vocabulary."""
        if place.before is None or place.parent is not None or place.architecture is None:
            raise ConfigError(
                f"rungs.{place.asset}: has a surgery table, but this experiment has no rung before it that "
                "has the donor's geometry, to start from"
            )
        return {
            "source": place.source,
            "donor": place.donor(vocab_size=place.sources.tokenizer.vocab_size),
            "text": "healing_text_v1",
            "architecture": plain(place.architecture),
            "dtype": place.dtype,
        }
