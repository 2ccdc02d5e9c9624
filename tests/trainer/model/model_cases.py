"""Tiny architectures with every feature of the real ones, and rows of tokens for them."""

import copy
from typing import Any

import torch

from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse

VOCAB = 96

_TABLES: dict[str, dict[str, Any]] = {
    "model": {
        "num_layers": 4,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_query_groups": 2,
        "head_dim": 8,
        "ffn_hidden_size": 12,
        "normalization": "RMSNorm",
        "norm_epsilon": 1e-6,
        "qk_layernorm": True,
        "softmax_type": "learnable",
        "value_residual": True,
        "value_residual_init": 0.7,
        "add_bias_linear": True,
        "add_qkv_bias": True,
        "gated_linear_unit": False,
        "activation": "squaredrelu",
        "untied_embeddings": True,
        "hidden_dropout": 0.0,
    },
    "attention": {
        "attention_dropout": 0.0,
        "max_sequence_length": 64,
        "position_embedding_type": "grapem",
        "window_size": 4,
        "window_attn_skip_freq": 4,
    },
    "tpa": {"use_tpa": True, "tpa_rank": 2, "tpa_q_rank": 4},
    "grape": {"grape_a": True, "rotary_base": 1e4},
}
_COMPAT = {
    "model": {"softmax_type": "vanilla", "value_residual": False},
    "attention": {"position_embedding_type": "rope", "window_size": 0},
    "tpa": {"use_tpa": False},
    "grape": {"grape_a": False, "rotary_base": 1e6},
}
_MOE = {
    "model": {"ffn_hidden_size": 6, "dense_ffn_hidden_size": 12},
    "moe": {
        "num_experts": 8,
        "topk": 2,
        "shared_expert": True,
        "shared_expert_size": 10,
        "first_layer_dense": True,
        "router_load_balancing_type": "seq_aux_loss",
        "aux_loss_coeff": 0.1,
        "router_score_function": "sigmoid",
        "router_topk_scaling_factor": 2.5,
        "router_num_groups": 4,
        "router_group_topk": 2,
        "router_enable_expert_bias": True,
        "router_bias_update_rate": 1e-3,
        "router_dtype": "fp32",
    },
}


def tiny(kind: str = "dense", **changes: dict[str, Any]) -> Architecture:
    """A checked architecture: ``compat``, ``dense`` or ``moe``, with tables changed key by key."""
    tables = copy.deepcopy(_TABLES)
    for layer in ({"compat": _COMPAT, "dense": {}, "moe": _MOE}[kind], changes):
        for name, keys in layer.items():
            tables.setdefault(name, {}).update(keys)
    return parse(Architecture, {"vocab_size": VOCAB, **tables})


def randomize(model: torch.nn.Module, seed: int = 5) -> torch.nn.Module:
    """Give biases, gains, sinks and ω values that a mistake about them would show in."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2 or name.endswith(("bias1", "bias2")):
                if not name.endswith("log_freq"):
                    parameter += 0.3 * torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            else:  # logits that differ: at 0.02 a four-layer model is nearly linear
                parameter *= 6.0
    return model


def rows(
    lengths: list[list[int]], seed: int = 0, width: int | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, position ids and document ids, each int64 ``[B, S]``.

    ``lengths`` gives the documents of each row; what is left of ``width`` is padding.
    """
    width = width or max(map(sum, lengths))
    tokens = torch.zeros(len(lengths), width, dtype=torch.int64)
    positions, documents = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    generator = torch.Generator().manual_seed(seed)
    for row, parts in enumerate(lengths):
        start = 0
        for number, length in enumerate(parts):
            stop = start + length
            tokens[row, start:stop] = torch.randint(1, VOCAB, (length,), generator=generator)
            positions[row, start:stop] = torch.arange(length)
            documents[row, start:stop] = number
            start = stop
    return tokens, positions, documents
