"""The ladder: each rung's geometry, how it is made from the rung before, and the healing run after it."""

from typing import Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.schema.architecture import (
    AttentionConfig,
    GrapeConfig,
    ModelConfig,
    MoeConfig,
    TpaConfig,
    check_geometry,
)
from trainer.contract.schema.base import (
    Count,
    Fraction,
    Frozen,
    NamedTables,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from trainer.contract.schema.training import TrainingConfig

GEOMETRY_TABLES = ("model", "attention", "tpa", "grape", "moe")
HF_RUNG = "qwen3_0_6b_o200k"
DEEP_RUNG = "vpdense_80"


class VocabularySurgery(Frozen):
    """Donor vocabulary → o200k, by mergekit's tokensurgeon run as a program.

    Attributes:
        approximation_method: How a token that the donor lacks gets its row: from the `k` shared tokens that
            rebuild its row in the vocabulary donor (`omp`), from its `k` nearest neighbours there
            (`common_interpolation`), from the donor's pieces of its text (`subword`), or none of it.
        k: Atoms or neighbours.
        subword_method: How pieces combine.
        weight_scheme: Of the neighbours.
        cosine_similarity: Distance of the neighbours; Euclidean otherwise.
        prefix_match: Let a token that the donor lacks take the row of its longest prefix that it has.
        byte_match: Let `<0x..>` tokens match characters.
        batch_size: Tokens approximated together.
    """

    tool: Literal["mergekit-tokensurgeon"]
    approximation_method: Literal["omp", "common_interpolation", "subword", "mean", "zero"]
    k: PositiveInt
    subword_method: Literal["mean", "sum", "weighted_mean", "first_last"] = "mean"
    weight_scheme: Literal["distance_proportional", "barycentric", "least_squares"] = "distance_proportional"
    cosine_similarity: bool = False
    prefix_match: bool = False
    byte_match: bool = False
    batch_size: PositiveInt = 512


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


class DepthSurgery(Frozen):
    """28 → 80 layers by inserting whole blocks whose residual branches are zero."""

    init_new_layers: Literal["zero_residual"]


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


class Healing(Frozen):
    """The stabilising run after a surgery.

    Attributes:
        learning_rate: Peak rate; the other groups' rates keep their proportion to it.
        new_layers_only_steps: Steps before `steps` in which only inserted layers are trained.
        harmony_fraction: Share of conversations; the rest is healing text.
    """

    steps: PositiveInt
    learning_rate: PositiveFloat
    new_layers_only_steps: Count = 0
    harmony_fraction: Fraction = 0.2
    training: TrainingConfig


class RungConfig(Frozen):
    """A Megatron rung: its geometry (`[rungs.defaults]` already merged in), surgery and healing."""

    model: ModelConfig
    attention: AttentionConfig
    tpa: TpaConfig
    grape: GrapeConfig
    moe: MoeConfig | None = None
    surgery: Any = None
    healing: Healing | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_geometry(self.model, self.attention, self.tpa, self.grape, self.moe)
        return self


class _DenseRung(RungConfig):
    @model_validator(mode="after")
    def _check_dense(self) -> Self:
        if self.moe is not None:
            raise ValueError("this rung is dense; a moe table belongs to rungs.vpmoe alone")
        return self


class VocabularyRung(Frozen):
    """The donor with the o200k vocabulary: a Hugging Face model whose geometry is the donor's."""

    surgery: VocabularySurgery


class CompatRung(_DenseRung):
    """Rung `vpdense0_5_28`: the donor's attention in the student's widths."""

    surgery: DenseSurgery | None = None


class MorphedRung(_DenseRung):
    """Rung `vpdense_28`: the student's attention."""

    surgery: MorphSurgery | None = None


class DeepRung(_DenseRung):
    """Rung `vpdense_80`: the student's depth."""

    surgery: DepthSurgery | None = None


class MoeRung(RungConfig):
    """Rung `vpmoe`: the student."""

    moe: MoeConfig
    surgery: MoeSurgery | None = None
    healing: Annotated[None, Field(description="the student's healing run is stage 1")] = None


class Rungs(NamedTables):
    """The rungs of an experiment, by asset name."""

    qwen3_0_6b_o200k: VocabularyRung | None = None
    vpdense0_5_28: CompatRung | None = None
    vpdense_28: MorphedRung | None = None
    vpdense_80: DeepRung | None = None
    vpmoe: MoeRung
