"""From an `Architecture` to the `TransformerConfig` that Megatron's modules read."""

from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig

from trainer.contract.fusions import asked_fusions, require_fusions
from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError
from trainer.contract.words import BACKENDS, require_word


def squared_relu(x: torch.Tensor) -> torch.Tensor:
    """ReLU² (Primer, So et al. 2021): `relu(x)²`, same shape and dtype as `x`.

    Megatron has the same function, but decorated with `torch.compile`, which on a CPU runs a C++ compiler.
    """
    return torch.nn.functional.relu(x).square()


@dataclass
class VPTransformerConfig(TransformerConfig):
    """Megatron's config plus what this architecture adds.

    Fields that Megatron already knows keep its names (`window_size`, `softmax_type`, `moe_router_*` …);
    the ones below have no counterpart there. Names that `GPTModel` looks for on a config
    (`position_embedding_type`, `rotary_base`) are avoided on purpose: it would build its own rotary
    embedding.

    Attributes:
        backend: Name of a module of `trainer.model.backends`.
        fusions: Fusions of the `moe` table that are asked of it.
    """

    backend: str = "reference"
    fusions: tuple[str, ...] = ()
    rotation: str = "grapem"
    rotation_base: float = 1e4
    learnable_rotation: bool = True
    share_rotation_across_heads: bool = True
    log_freq_scale: float = 16.0
    alibi: bool = False
    use_tpa: bool = False
    tpa_rank: int | None = None
    tpa_q_rank: int | None = None
    value_residual: bool = False
    value_residual_init: float = 1.0
    value_residual_eps: float = 1e-2
    dense_ffn_hidden_size: int | None = None
    local_layers: tuple[bool, ...] = ()
    moe_layers: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        """Refuse what cannot run, before Megatron's own checks speak of its command-line flags."""
        _check_backend(self)
        _check_layout(self)
        _check_value_residual(self)
        _check_positions(self)
        _check_moe(self)
        super().__post_init__()

    def is_local(self, layer_number: int) -> bool:
        """Whether the layer (1-based number) is local: windowed, with TPA and GRAPE-M."""
        return self.local_layers[layer_number - 1]

    @property
    def window(self) -> int | None:
        """Keys that a local layer sees, including the current token; None without a window."""
        return None if self.window_size is None else self.window_size[0] + 1

    @property
    def attention_bias(self) -> bool:
        """Whether attention projections, the output projection among them, carry a bias."""
        return bool(self.add_bias_linear or self.add_qkv_bias)


def transformer_config(
    arch: Architecture,
    *,
    dtype: torch.dtype = torch.float32,
    tp: int = 1,
    ep: int = 1,
    backend: str = "reference",
    **overrides: Any,
) -> VPTransformerConfig:
    """Translate an architecture for one parallel layout.

    Args:
        arch: The checked tables of a rung.
        dtype: Storage and activation dtype, `torch.float32` or `torch.bfloat16`.
        tp: Tensor-parallel size.
        ep: Expert-parallel size; experts are never split over tensor-parallel ranks.
        backend: Name of a module of `trainer.model.backends`.
        **overrides: Further `TransformerConfig` fields, for a caller that wants to say more than an
            experiment can.

    Returns:
        The config, validated.

    Raises:
        ConfigError: Naming the key, the value found and the remedy.
    """
    if dtype not in (torch.float32, torch.bfloat16):
        raise ConfigError(f"training.dtype: found {dtype}; allowed: fp32, bf16")
    model, attention, tpa, grape = arch.model, arch.attention, arch.tpa, arch.grape
    fields: dict[str, Any] = {
        "num_layers": model.num_layers,
        "hidden_size": model.hidden_size,
        "num_attention_heads": model.num_attention_heads,
        "num_query_groups": model.num_query_groups,
        "kv_channels": model.head_dim,
        "ffn_hidden_size": model.ffn_hidden_size,
        "dense_ffn_hidden_size": dense_ffn_hidden_size(arch),
        "normalization": model.normalization,
        "layernorm_epsilon": model.norm_epsilon,
        "qk_layernorm": model.qk_layernorm,
        "softmax_type": model.softmax_type,
        "value_residual": model.value_residual,
        "value_residual_init": model.value_residual_init,
        "value_residual_eps": model.value_residual_eps,
        "add_bias_linear": model.add_bias_linear,
        "add_qkv_bias": model.add_qkv_bias,
        "gated_linear_unit": model.gated_linear_unit,
        "activation_func": squared_relu,
        "hidden_dropout": model.hidden_dropout,
        "attention_dropout": attention.attention_dropout,
        "attention_softmax_in_fp32": attention.softmax_in_fp32,
        "window_size": (attention.window_size - 1, 0) if attention.window_size else None,
        "local_layers": tuple(kind == "local" for kind in layer_kinds(arch)),
        "rotation": attention.position_embedding_type,
        "rotation_base": grape.rotary_base,
        "learnable_rotation": grape.grapem_learnable_freq,
        "share_rotation_across_heads": grape.grapem_share_across_heads,
        "log_freq_scale": grape.grapem_log_freq_scale,
        "alibi": grape.grape_a,
        "use_tpa": tpa.use_tpa,
        "tpa_rank": tpa.tpa_rank,
        "tpa_q_rank": tpa.tpa_q_rank,
        "moe_layers": moe_layers(arch),
        "backend": backend,
        "fusions": asked_fusions(arch.moe),
        "tensor_model_parallel_size": tp,
        "expert_model_parallel_size": ep,
        "expert_tensor_parallel_size": 1,
        "params_dtype": dtype,
        "pipeline_dtype": dtype,
        "bf16": dtype == torch.bfloat16,
        # Weights are made by name in trainer.model.init, the same for every layout; "cpu initialization" only
        # keeps Megatron's linears from asking for the current CUDA device.
        "perform_initialization": False,
        "use_cpu_initialization": True,
        "bias_activation_fusion": False,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": False,
        "persist_layer_norm": False,
        # Layers differ in their parameters (local and global attention, dense and MoE), so checkpoints need a
        # key per layer instead of one stacked tensor.
        "hetereogenous_dist_checkpoint": True,
    }
    fields |= _moe_fields(arch)
    return VPTransformerConfig(**(fields | overrides))


def _moe_fields(arch: Architecture) -> dict[str, Any]:
    moe = arch.moe
    if moe is None:
        return {}
    routed = set(moe_layers(arch))
    return {
        "num_moe_experts": moe.num_experts,
        "moe_router_topk": moe.topk,
        "moe_ffn_hidden_size": arch.model.ffn_hidden_size,
        "moe_shared_expert_intermediate_size": moe.shared_expert_size if moe.shared_expert else None,
        "moe_layer_freq": [int(number in routed) for number in range(1, arch.model.num_layers + 1)],
        "moe_router_load_balancing_type": moe.router_load_balancing_type,
        "moe_aux_loss_coeff": moe.aux_loss_coeff if moe.router_load_balancing_type != "none" else 0.0,
        "moe_router_score_function": moe.router_score_function,
        "moe_router_topk_scaling_factor": moe.router_topk_scaling_factor,
        "moe_router_num_groups": moe.router_num_groups,
        "moe_router_group_topk": moe.router_group_topk,
        "moe_router_enable_expert_bias": moe.router_enable_expert_bias,
        "moe_router_bias_update_rate": moe.router_bias_update_rate,
        "moe_router_dtype": moe.router_dtype,
        "moe_router_pre_softmax": False,
        "moe_token_dispatcher_type": "alltoall",
    }


def _check_backend(config: VPTransformerConfig) -> None:
    try:
        require_word(BACKENDS, config.backend, "training.backend")
        require_fusions(config.backend, config.fusions)
    except ValueError as error:
        raise ConfigError(str(error)) from None
    for fusion in (  # Megatron's own, for modules of Megatron that are not used here
        "bias_activation_fusion",
        "bias_dropout_fusion",
        "masked_softmax_fusion",
        "moe_grouped_gemm",
        "moe_permute_fusion",
        "moe_router_fusion",
        "gradient_accumulation_fusion",
    ):
        if getattr(config, fusion):
            raise ConfigError(
                f"{fusion} = true: a fusion of Megatron's own modules, which this model does not have; set "
                "it to false"
            )


def _check_layout(config: VPTransformerConfig) -> None:
    tp = config.tensor_model_parallel_size
    if config.num_query_groups is None or config.num_query_groups % tp:
        raise ConfigError(
            f"execution.tp = {tp} does not divide model.num_query_groups = {config.num_query_groups}: a "
            "key/value head is not split over ranks; choose a tp that divides it"
        )
    if config.context_parallel_size != 1:
        raise ConfigError(
            f"context_parallel_size = {config.context_parallel_size}: attention needs all keys of a row on "
            "one rank; set it to 1"
        )
    if config.sequence_parallel:
        raise ConfigError(
            "sequence_parallel = true: norms are plain torch and do not split the sequence; set it to false"
        )
    if len(config.local_layers) != config.num_layers:
        raise ConfigError(
            f"local_layers has {len(config.local_layers)} entries, but model.num_layers = {config.num_layers}"
        )


def _check_value_residual(config: VPTransformerConfig) -> None:
    if not config.value_residual:
        return
    if config.pipeline_model_parallel_size != 1:
        raise ConfigError(
            f"pipeline_model_parallel_size = {config.pipeline_model_parallel_size} with model.value_residual "
            "= true: later stages have no access to layer 1's values; set it to 1"
        )
    if not 0.0 <= config.value_residual_init <= 1.0:
        raise ConfigError(
            f"model.value_residual_init: found {config.value_residual_init}; allowed: 0 to 1, it is a mixing "
            "weight"
        )
    if config.recompute_granularity == "full":
        raise ConfigError(
            "recompute_granularity = 'full' with model.value_residual = true: a recomputed block would lose "
            "the gradient into layer 1's values; set it to None"
        )


def _check_positions(config: VPTransformerConfig) -> None:
    if config.rotation not in ("grapem", "rope"):
        raise ConfigError(
            f"attention.position_embedding_type: found {config.rotation!r}; allowed: grapem, rope"
        )
    if config.rotation_base is None:
        raise ConfigError(
            f"grape.rotary_base: missing; attention.position_embedding_type = {config.rotation!r} needs an "
            "explicit base"
        )
    if config.log_freq_scale <= 0:
        raise ConfigError(f"grape.grapem_log_freq_scale: found {config.log_freq_scale}; it must be above 0")
    if config.apply_rope_fusion:
        raise ConfigError(
            "apply_rope_fusion = true: a fused rotation cannot give GRAPE-M's frequencies a gradient; set it "
            "to false"
        )
    if config.rotary_interleaved:
        raise ConfigError(
            "rotary_interleaved = true: rotations pair dimension i with i + D/2; set it to false"
        )
    if not config.share_rotation_across_heads and config.num_query_groups != config.num_attention_heads:
        raise ConfigError(
            "grape.grapem_share_across_heads = false with model.num_query_groups = "
            f"{config.num_query_groups} and model.num_attention_heads = {config.num_attention_heads}: a key "
            "head would need several rotations; set it to true"
        )
    if config.softmax_type not in ("vanilla", "off-by-one", "learnable"):
        raise ConfigError(
            f"model.softmax_type: found {config.softmax_type!r}; allowed: vanilla, off-by-one, learnable"
        )
    if not config.attention_softmax_in_fp32:
        raise ConfigError(
            "attention.softmax_in_fp32 = false: the softmax always runs in fp32; set it to true"
        )
    if config.use_tpa and (config.window_size is None or not config.tpa_rank or not config.tpa_q_rank):
        raise ConfigError(
            "tpa.use_tpa = true needs attention.window_size > 0, tpa.tpa_rank and tpa.tpa_q_rank; found "
            f"window_size = {config.window_size}, tpa_rank = {config.tpa_rank}, tpa_q_rank = "
            f"{config.tpa_q_rank}"
        )


def _check_moe(config: VPTransformerConfig) -> None:
    ep, experts = config.expert_model_parallel_size, config.num_moe_experts
    if experts is None:
        if ep != 1:
            raise ConfigError(
                f"execution.ep = {ep}: the model has no moe table, so there are no experts; set ep = 1"
            )
        return
    if experts % ep:
        raise ConfigError(
            f"execution.ep = {ep} does not divide moe.num_experts = {experts}; choose an ep that does"
        )
    if config.expert_tensor_parallel_size != 1:
        raise ConfigError(
            f"expert_tensor_parallel_size = {config.expert_tensor_parallel_size}: a biased expert is not "
            "split over ranks; set it to 1"
        )
    if config.moe_router_dtype not in ("fp32", "fp64"):
        raise ConfigError(f"moe.router_dtype: found {config.moe_router_dtype!r}; allowed: fp32, fp64")
    if config.moe_router_score_function not in ("sigmoid", "softmax"):
        raise ConfigError(
            f"moe.router_score_function: found {config.moe_router_score_function!r}; allowed: sigmoid, "
            "softmax"
        )
    if config.moe_router_enable_expert_bias and config.moe_router_score_function != "sigmoid":
        raise ConfigError(
            "moe.router_enable_expert_bias = true with moe.router_score_function = "
            f"{config.moe_router_score_function!r}: the bias is defined for sigmoid scores; set one of them"
        )
    if config.moe_router_load_balancing_type not in ("seq_aux_loss", "none"):
        raise ConfigError(
            f"moe.router_load_balancing_type: found {config.moe_router_load_balancing_type!r}; "
            "allowed: seq_aux_loss, none"
        )
