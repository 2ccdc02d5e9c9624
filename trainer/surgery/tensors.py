"""Every tensor of a checkpoint, from its architecture alone: nothing is built, Megatron not imported."""

import torch

from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.schema.architecture import Architecture
from trainer.surgery.tensorfile import TensorSpec

TORCH_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
LAYER = "decoder.layers.{}."
"""Prefix of a layer's tensors; the index counts from 0, layer numbers from 1."""

EMBEDDING = "embedding.word_embeddings.weight"
HEAD = "output_layer.weight"
FINAL_NORM = "decoder.final_layernorm.weight"
LOG_FREQ = "rotary_pos_emb.log_freq"

FLOAT32 = ("log_freq", "value_residual_logit", "expert_bias")
"""Last parts of the names of tensors that are fp32 in a model of any dtype."""

BUFFERS = ("expert_bias",)
"""Last parts of the names of stored tensors that no optimizer trains."""


def tensor_table(architecture: Architecture, dtype: str) -> dict[str, TensorSpec]:
    """Name, shape and type of every tensor of a published checkpoint.

    Args:
        architecture: Of the model.
        dtype: `fp32` or `bf16`.

    Returns:
        By Megatron parameter name, in the order of the layers.
    """
    model = architecture.model
    shapes: dict[str, tuple[int, ...]] = {
        EMBEDDING: (architecture.vocab_size, model.hidden_size),
        HEAD: (architecture.vocab_size, model.hidden_size),
        FINAL_NORM: (model.hidden_size,),
    }
    kinds, routed = layer_kinds(architecture), moe_layers(architecture)
    if architecture.attention.position_embedding_type == "grapem" and "local" in kinds:
        heads = () if architecture.grape.grapem_share_across_heads else (model.num_attention_heads,)
        shapes[LOG_FREQ] = (*heads, model.head_dim // 2)
    for number, kind in enumerate(kinds, start=1):
        layer = {
            "input_layernorm.weight": (model.hidden_size,),
            "pre_mlp_layernorm.weight": (model.hidden_size,),
            **_attention(architecture, number, local=kind == "local"),
            **(_experts(architecture) if number in routed else _ffn(architecture)),
        }
        shapes |= {LAYER.format(number - 1) + name: shape for name, shape in layer.items()}
    return {name: TensorSpec(shape, storage_dtype(name, dtype)) for name, shape in shapes.items()}


def storage_dtype(name: str, dtype: str) -> torch.dtype:
    """Type in which a tensor is stored in a checkpoint of `fp32` or `bf16`."""
    return torch.float32 if name.rpartition(".")[2] in FLOAT32 else TORCH_DTYPES[dtype]


def _attention(architecture: Architecture, number: int, *, local: bool) -> dict[str, tuple[int, ...]]:
    model, tpa = architecture.model, architecture.tpa
    hidden, dim = model.hidden_size, model.head_dim
    heads, groups = model.num_attention_heads, model.num_query_groups
    width, biased = (heads + 2 * groups) * dim, model.add_bias_linear or model.add_qkv_bias
    shapes: dict[str, tuple[int, ...]] = {}
    if tpa.use_tpa and local:
        q_rank, rank = tpa.tpa_q_rank or 0, tpa.tpa_rank or 0  # set, by the config
        shapes |= {
            "linear_tpa.a_q": (heads * q_rank, hidden),
            "linear_tpa.a_k": (groups * rank, hidden),
            "linear_tpa.a_v": (groups * rank, hidden),
            "linear_tpa.b_q": (q_rank * dim, hidden),
            "linear_tpa.b_k": (rank * dim, hidden),
            "linear_tpa.b_v": (rank * dim, hidden),
        }
        if biased:
            shapes["linear_tpa.bias"] = (width,)
    else:
        shapes["linear_qkv.weight"] = (width, hidden)
        if biased:
            shapes["linear_qkv.bias"] = (width,)
    if model.qk_layernorm:
        shapes |= {"q_layernorm.weight": (dim,), "k_layernorm.weight": (dim,)}
    shapes["linear_proj.weight"] = (hidden, heads * dim)
    if biased:
        shapes["linear_proj.bias"] = (hidden,)
    if model.softmax_type == "learnable":
        shapes["core_attention.softmax_offset"] = (heads,)
    if model.value_residual and number > 1:
        shapes["value_residual_logit"] = ()
    return {f"self_attention.{name}": shape for name, shape in shapes.items()}


def _ffn(architecture: Architecture, width: int | None = None) -> dict[str, tuple[int, ...]]:
    hidden = architecture.model.hidden_size
    width = width or dense_ffn_hidden_size(architecture)
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.linear_fc1.weight": (width, hidden),
        "mlp.linear_fc2.weight": (hidden, width),
    }
    if architecture.model.add_bias_linear:
        shapes |= {"mlp.linear_fc1.bias": (width,), "mlp.linear_fc2.bias": (hidden,)}
    return shapes


def _experts(architecture: Architecture) -> dict[str, tuple[int, ...]]:
    model, moe = architecture.model, architecture.moe
    assert moe is not None
    hidden, width, experts = model.hidden_size, model.ffn_hidden_size, moe.num_experts
    shapes: dict[str, tuple[int, ...]] = {
        "mlp.router.weight": (experts, hidden),
        "mlp.experts.weight1": (experts, width, hidden),
        "mlp.experts.weight2": (experts, hidden, width),
    }
    if model.add_bias_linear:
        shapes |= {
            "mlp.router.bias": (experts,),
            "mlp.experts.bias1": (experts, width),
            "mlp.experts.bias2": (experts, hidden),
        }
    if moe.router_enable_expert_bias:
        shapes["mlp.router.expert_bias"] = (experts,)
    if moe.shared_expert:
        shared = _ffn(architecture, moe.shared_expert_size)
        shapes |= {name.replace("mlp.", "mlp.shared_experts."): shape for name, shape in shared.items()}
    return shapes
