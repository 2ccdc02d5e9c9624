"""What teachers are made from, and what they must say by a naive computation in float64."""

import json
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from transformers import GptOssConfig, GptOssForCausalLM

from tests.trainer.evaluate.evaluation_inputs import architecture, write_tokenizer
from trainer.checkpoints.published import save_published
from trainer.job.distributed import session
from trainer.model.gpt import build_model

WINDOW = 6
FP4 = np.array([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0])


def published(directory: Path, *, layers: int = 4, seed: int = 3) -> Path:
    """A checkpoint of ours over the real vocabulary, whose predictions differ by more than round-off."""
    with nullcontext() if dist.is_initialized() else session("cpu"):
        model = build_model(architecture(layers), seed=seed)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.mul_(4)
        save_published(model, architecture(layers), directory)
    return directory


def write_gpt_oss(directory: Path, *, seed: int = 0) -> Path:
    """A GPT-OSS of two layers, one with a window, in bf16."""
    size = write_tokenizer(directory)
    torch.manual_seed(seed)
    config = GptOssConfig(
        vocab_size=size,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=4,
        num_experts_per_tok=2,
        sliding_window=WINDOW,
        layer_types=["sliding_attention", "full_attention"],
        max_position_embeddings=256,
        initializer_range=0.3,
        eos_token_id=size - 1,
        pad_token_id=0,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    GptOssForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    return directory


def write_mxfp4(source: Path, packed: Path, twin: Path) -> None:
    """Two copies of a GPT-OSS: experts in MXFP4 blocks and scales as published, and the same values in bf16.

    Codes and scales are drawn; the twin's values come from them by the definition of the format (OCP MX: 32
    elements share a power of two; the low nibble comes first).
    """
    draw = np.random.default_rng(7)
    config = json.loads((source / "config.json").read_text())
    tensors = load_file(source / "model.safetensors")
    wide, narrow = dict(tensors), dict(tensors)
    for name, tensor in tensors.items():
        if not name.endswith(("gate_up_proj", "down_proj")) or "experts" not in name:
            continue
        experts, rows, columns = tensor.shape  # [E, in, out]; stored as [E, out, in / 32, 16]
        codes = draw.integers(0, 16, size=(experts, columns, rows // 32, 32))
        scales = draw.integers(122, 126, size=(experts, columns, rows // 32))
        values = np.where(codes < 8, 1, -1) * FP4[codes % 8] * np.exp2(scales[..., None] - 127.0)
        dense = values.reshape(experts, columns, rows).transpose(0, 2, 1)
        wide[name] = torch.from_numpy(np.ascontiguousarray(dense)).to(torch.bfloat16)
        assert np.array_equal(wide[name].double().numpy(), dense)  # bf16 holds every value of the format
        del narrow[name]
        narrow[f"{name}_blocks"] = torch.from_numpy(
            (codes[..., 0::2] | codes[..., 1::2] << 4).astype(np.uint8)
        )
        narrow[f"{name}_scales"] = torch.from_numpy(scales.astype(np.uint8))
    told = {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]}
    for directory, weights, more in ((twin, wide, {}), (packed, narrow, {"quantization_config": told})):
        directory.mkdir()
        save_file(
            {k: v.contiguous() for k, v in weights.items()}, directory / "model.safetensors", {"format": "pt"}
        )
        (directory / "config.json").write_text(json.dumps(config | more))
        for file in ("tokenizer.json", "tokenizer_config.json"):
            (directory / file).write_bytes((source / file).read_bytes())


def naive(
    logits: Any, label: int, topk: int, mass: float | None = None
) -> tuple[float, list[int], list[float], float]:
    """Log-probability of the label, likeliest ids with theirs, tail mass; float64, one position."""
    scores = np.asarray(logits, dtype=np.float64)
    logprobs = scores - scores.max()
    logprobs = logprobs - np.log(np.exp(logprobs).sum())
    order = np.argsort(-logprobs, kind="stable")[:topk]
    if mass is not None:
        enough = np.flatnonzero(np.cumsum(np.exp(logprobs[order])) >= mass)
        order = order[: (enough[0] + 1 if len(enough) else topk)]
    rest = np.delete(np.exp(logprobs), order)
    return float(logprobs[label]), order.tolist(), logprobs[order].tolist(), float(rest.sum())


def module_logits(module: Any, tokens: Any) -> np.ndarray:
    """Logits `[n, V]` of one sequence by the library's own model."""
    with torch.no_grad():
        return module(torch.tensor([list(tokens)])).logits[0].float().numpy()
