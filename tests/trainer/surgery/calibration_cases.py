"""Tiny text, donors and checkpoints for the tests of calibration, refit and morph."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer.checkpoints.published import save_published
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse
from trainer.model.gpt import build_model

EOD = 90


def write_text(root: Path, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """A plain-text data set of documents of these lengths, EOD included, with ids below 90."""
    generator = np.random.default_rng(seed)
    documents = [np.append(generator.integers(1, EOD, size=length - 1), EOD) for length in lengths]
    (root / "train").mkdir(parents=True, exist_ok=True)
    prefix = root / "train" / "healing_text_v1_tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    manifest = {"schema_version": "healing_text_v1", "config": {"eod_token_id": EOD}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return documents


VOCAB = 96

_MODEL: dict[str, Any] = {
    "num_layers": 4,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_query_groups": 2,
    "head_dim": 8,
    "ffn_hidden_size": 12,
    "normalization": "RMSNorm",
    "norm_epsilon": 1e-6,
    "qk_layernorm": True,
    "value_residual_init": 1.0,
    "add_bias_linear": True,
    "add_qkv_bias": True,
    "gated_linear_unit": False,
    "activation": "squaredrelu",
    "untied_embeddings": True,
    "hidden_dropout": 0.0,
}
_ATTENTION: dict[str, Any] = {"attention_dropout": 0.0, "max_sequence_length": 64}


def compat() -> Architecture:
    """The parent: full causal attention with RoPE."""
    return parse(
        Architecture,
        {
            "vocab_size": VOCAB,
            "model": _MODEL | {"softmax_type": "vanilla", "value_residual": False},
            "attention": _ATTENTION | {"position_embedding_type": "rope", "window_size": 0},
            "tpa": {"use_tpa": False},
            "grape": {"grape_a": False, "rotary_base": 1e6},
        },
    )


def morphed(**model: Any) -> Architecture:
    """The result: windows and tensor products on layers 1 to 3, GRAPE, sinks, value residual."""
    return parse(
        Architecture,
        {
            "vocab_size": VOCAB,
            "model": _MODEL | {"softmax_type": "learnable", "value_residual": True} | model,
            "attention": _ATTENTION
            | {"position_embedding_type": "grapem", "window_size": 8, "window_attn_skip_freq": 4},
            "tpa": {"use_tpa": True, "tpa_rank": 2, "tpa_q_rank": 4},
            "grape": {"grape_a": True, "rotary_base": 1e6},
        },
    )


def publish(architecture: Architecture, directory: Path, seed: int = 5) -> torch.nn.Module:
    """A model with biases and gains that a mistake about them would show in, written to a directory."""
    model = build_model(architecture, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim == 1 and not name.endswith("log_freq"):
                parameter += 0.3 * torch.randn(parameter.shape, generator=generator)
            elif parameter.ndim > 1:
                parameter *= 4.0
    save_published(model, architecture, directory)
    return model.eval()


def donor(directory: Path, *, act: str = "silu", seed: int = 0, layers: int = 3) -> Qwen3ForCausalLM:
    """A small Qwen3 model with outputs far from linear, written in Hugging Face's layout."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB,
        hidden_size=32,
        intermediate_size=24,
        num_hidden_layers=layers,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=8,
        hidden_act=act,
        rms_norm_eps=1e-6,
        rope_theta=1e6,
        tie_word_embeddings=True,
        attention_bias=False,
        attn_implementation="eager",
    )
    model = Qwen3ForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter *= 6.0
            else:
                parameter += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(directory)
    return model
