"""The geometry of a checkpoint, and the rules that make it a model the trainer can build."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.pattern import layer_pattern
from trainer.contract.schema.base import Count, Fraction, Frozen, NonNegativeFloat, PositiveFloat, PositiveInt


class ModelConfig(Frozen):
    """Widths, depth and the switches of the residual block.

    Attributes:
        ffn_hidden_size: Width of the dense FFN; with a `moe` table, of one routed expert.
        dense_ffn_hidden_size: Width of an MoE model's dense first layer (default: `ffn_hidden_size`).
        value_residual_init: λ of `v ← λ v + (1 − λ) v₁` at initialisation, before clamping.
        value_residual_eps: Clamp of λ at initialisation, so that its logit stays finite and trainable.
    """

    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_query_groups: PositiveInt
    head_dim: PositiveInt
    ffn_hidden_size: PositiveInt
    dense_ffn_hidden_size: PositiveInt | None = None
    normalization: Literal["RMSNorm"]
    norm_epsilon: PositiveFloat
    qk_layernorm: bool
    softmax_type: Literal["vanilla", "off-by-one", "learnable"]
    value_residual: bool
    value_residual_init: Fraction = 1.0
    value_residual_eps: Annotated[float, Field(gt=0, lt=0.5)] = 1e-2
    add_bias_linear: bool
    add_qkv_bias: bool
    gated_linear_unit: Literal[False]
    activation: Literal["squaredrelu"]
    untied_embeddings: Literal[True]
    hidden_dropout: float

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.head_dim * self.num_attention_heads != self.hidden_size:
            raise ValueError(
                f"head_dim × num_attention_heads = {self.head_dim} × {self.num_attention_heads} = "
                f"{self.head_dim * self.num_attention_heads}, but hidden_size = {self.hidden_size}; "
                "they must be equal"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim = {self.head_dim}; rotations pair dimensions, so it must be even")
        if self.num_attention_heads % self.num_query_groups:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_query_groups = {self.num_query_groups}"
            )
        if self.hidden_dropout != 0.0:
            raise ValueError(
                f"hidden_dropout = {self.hidden_dropout}; allowed: 0.0 (the trainer has no dropout)"
            )
        return self


class AttentionConfig(Frozen):
    """Masks and positions.

    Attributes:
        window_size: Keys a local layer sees, including the current token; 0: every layer is global.
        window_attn_skip_freq: n makes every n-th layer global; a list gives each layer its kind, 1 = local.
        position_embedding_type: `grapem` (learnable, local layers) or `rope` (the donor's, all layers).
    """

    attention_dropout: float
    max_sequence_length: PositiveInt
    position_embedding_type: Literal["grapem", "rope"]
    window_size: Count
    window_attn_skip_freq: (
        PositiveInt | Annotated[tuple[Annotated[int, Field(ge=0, le=1)], ...], Field(strict=False)] | None
    ) = None
    softmax_in_fp32: Literal[True] = True

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.attention_dropout != 0.0:
            raise ValueError(
                f"attention_dropout = {self.attention_dropout}; allowed: 0.0 (the trainer has no dropout)"
            )
        return self


class TpaConfig(Frozen):
    """Tensor-product attention on local layers: ranks of the query and of the key and value factors."""

    use_tpa: bool
    tpa_rank: PositiveInt | None = None
    tpa_q_rank: PositiveInt | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.use_tpa and (self.tpa_rank is None or self.tpa_q_rank is None):
            raise ValueError("use_tpa = true needs both tpa_rank and tpa_q_rank")
        return self


class GrapeConfig(Frozen):
    """Positions: GRAPE-M on local layers, GRAPE-A (an ALiBi bias) on global ones.

    Attributes:
        rotary_base: Base of the rotation's initial frequencies; the donor's θ for `rope`.
        grapem_log_freq_scale: γ of `log_freq = γ ln f`; it divides the learning rate of ln f.
    """

    grape_a: bool
    rotary_base: PositiveFloat | None = None
    grapem_learnable_freq: bool = True
    grapem_share_across_heads: bool = True
    grapem_log_freq_scale: PositiveFloat = 16.0


class MoeConfig(Frozen):
    """Routed experts: the router, its balancing and the shared expert."""

    num_experts: PositiveInt
    topk: PositiveInt
    shared_expert: bool
    shared_expert_size: PositiveInt | None = None
    first_layer_dense: bool
    router_load_balancing_type: Literal["seq_aux_loss", "none"]
    aux_loss_coeff: NonNegativeFloat
    router_score_function: Literal["sigmoid", "softmax"]
    router_topk_scaling_factor: PositiveFloat
    router_num_groups: PositiveInt | None = None
    router_group_topk: PositiveInt | None = None
    router_enable_expert_bias: bool
    router_bias_update_rate: NonNegativeFloat = 1e-3
    router_dtype: Literal["fp32", "fp64"]
    grouped_gemm: bool = False
    permute_fusion: bool = False
    router_fusion: bool = False

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.topk > self.num_experts:
            raise ValueError(f"topk = {self.topk} is more than num_experts = {self.num_experts}")
        if self.shared_expert and self.shared_expert_size is None:
            raise ValueError("shared_expert = true needs shared_expert_size")
        if self.router_enable_expert_bias and self.router_score_function != "sigmoid":
            raise ValueError(
                f"router_enable_expert_bias = true needs router_score_function = 'sigmoid', "
                f"found {self.router_score_function!r}"
            )
        self._check_groups()
        return self

    def _check_groups(self) -> None:
        groups, group_topk = self.router_num_groups, self.router_group_topk
        if (groups is None) != (group_topk is None):
            raise ValueError("router_num_groups and router_group_topk are set together or not at all")
        if groups is None or group_topk is None:
            return
        if self.num_experts % groups:
            raise ValueError(
                f"num_experts = {self.num_experts} is not a multiple of router_num_groups = {groups}"
            )
        if group_topk > groups:
            raise ValueError(f"router_group_topk = {group_topk} is more than router_num_groups = {groups}")
        if self.topk % group_topk:
            raise ValueError(f"topk = {self.topk} is not a multiple of router_group_topk = {group_topk}")
        if self.topk > group_topk * (self.num_experts // groups):
            raise ValueError(
                f"topk = {self.topk} experts cannot be chosen from "
                f"router_group_topk = {group_topk} groups of {self.num_experts // groups}"
            )


class Architecture(Frozen):
    """Everything that decides a checkpoint's tensors and function, apart from the tensors' values."""

    vocab_size: PositiveInt
    model: ModelConfig
    attention: AttentionConfig
    tpa: TpaConfig
    grape: GrapeConfig
    moe: MoeConfig | None = None

    @model_validator(mode="after")
    def _check(self) -> Self:
        check_geometry(self.model, self.attention, self.tpa, self.grape, self.moe)
        return self


def check_geometry(
    model: ModelConfig, attention: AttentionConfig, tpa: TpaConfig, grape: GrapeConfig, moe: MoeConfig | None
) -> None:
    """Refuse tables that are each valid but do not make a model together.

    Raises:
        ValueError: Naming the keys, their values and what would be allowed.
    """
    _check_windows(model, attention, tpa, grape)
    if attention.position_embedding_type == "rope":
        _check_rope(attention, tpa, grape)
    else:
        _check_grapem(model, attention, grape)
    if moe is None and model.dense_ffn_hidden_size not in (None, model.ffn_hidden_size):
        raise ValueError(
            f"model.dense_ffn_hidden_size = {model.dense_ffn_hidden_size} differs from "
            f"model.ffn_hidden_size = {model.ffn_hidden_size} in a model without a moe table, "
            "where every layer is dense; set one of them"
        )


def _check_windows(
    model: ModelConfig, attention: AttentionConfig, tpa: TpaConfig, grape: GrapeConfig
) -> None:
    pattern = attention.window_attn_skip_freq
    if grape.grape_a and pattern is None:
        raise ValueError(
            "grape.grape_a = true needs attention.window_attn_skip_freq, which says which layers are global"
        )
    if tpa.use_tpa and attention.window_size == 0:
        raise ValueError(
            "tpa.use_tpa = true needs attention.window_size > 0: tensor-product attention runs on local "
            "layers, and a model without a window has none"
        )
    if attention.window_size == 0:
        return
    if isinstance(pattern, tuple) and len(pattern) != model.num_layers:
        raise ValueError(
            f"attention.window_attn_skip_freq lists {len(pattern)} layers, but "
            f"model.num_layers = {model.num_layers}"
        )
    if isinstance(pattern, int) and model.num_layers % pattern:
        raise ValueError(
            f"model.num_layers = {model.num_layers} is not a multiple of "
            f"attention.window_attn_skip_freq = {pattern}"
        )


def _check_rope(attention: AttentionConfig, tpa: TpaConfig, grape: GrapeConfig) -> None:
    if grape.rotary_base is None:
        raise ValueError("attention.position_embedding_type = 'rope' needs grape.rotary_base (the donor's θ)")
    for clash, name in (
        (attention.window_size > 0, f"attention.window_size = {attention.window_size} (allowed: 0)"),
        (tpa.use_tpa, "tpa.use_tpa = true (allowed: false)"),
        (grape.grape_a, "grape.grape_a = true (allowed: false)"),
    ):
        if clash:
            raise ValueError(
                f"attention.position_embedding_type = 'rope' is full causal attention; found {name}"
            )


def _check_grapem(model: ModelConfig, attention: AttentionConfig, grape: GrapeConfig) -> None:
    if grape.rotary_base is None:
        raise ValueError(
            "attention.position_embedding_type = 'grapem' needs grape.rotary_base for its initial frequencies"
        )
    if not grape.grapem_share_across_heads and model.num_query_groups != model.num_attention_heads:
        raise ValueError(
            f"grape.grapem_share_across_heads = false needs one key head per query head, but "
            f"model.num_query_groups = {model.num_query_groups} and "
            f"model.num_attention_heads = {model.num_attention_heads}"
        )
    kinds = layer_pattern(model.num_layers, attention.window_size, attention.window_attn_skip_freq)
    if not grape.grape_a and "global" in kinds:
        raise ValueError(
            "grape.grape_a = false leaves global layers without positions: GRAPE-M rotates local ones only"
        )
