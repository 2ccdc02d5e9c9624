"""Which kind of layer each module of a model is, and ranges around their forward passes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from trainer.model.gpt import VPGPTModel
from trainer.model.moe import MoELayer
from trainer.profiling.timeline import RANGE

EMBEDDING = "embedding"
ROTATION = "rotation angles"
WINDOW = "window attention"
GLOBAL = "global attention"
TPA = "TPA projections"
QKV = "QKV projections"
OUTPUT = "output projections"
HEADS = "QK-norm, rotation, value residual"
NORMS = "norms"
ROUTER = "router"
EXPERTS = "experts"
SHARED = "shared experts"
FFN = "dense FFN"
RESIDUAL = "residual sums"
HEAD = "head and loss"


def kinds_of(model: VPGPTModel) -> Iterator[tuple[nn.Module, str]]:
    """Yield the modules whose kind is known, outer ones first; what is inside a module is of its kind.

    Args:
        model: The model.
    """
    yield model.embedding, EMBEDDING
    if model.rotary_pos_emb is not None:
        yield model.rotary_pos_emb, ROTATION
    for layer in model.decoder.layers:
        attention = layer.self_attention
        yield layer, RESIDUAL
        yield layer.input_layernorm, NORMS
        yield layer.pre_mlp_layernorm, NORMS
        yield attention, HEADS
        yield attention.core_attention, WINDOW if model.config.is_local(layer.layer_number) else GLOBAL
        yield (attention.linear_tpa, TPA) if attention.tensor_product else (attention.linear_qkv, QKV)
        yield attention.linear_proj, OUTPUT
        if isinstance(layer.mlp, MoELayer):
            yield layer.mlp, EXPERTS
            yield layer.mlp.router, ROUTER
            yield layer.mlp.experts, EXPERTS
            if layer.mlp.shared_experts is not None:
                yield layer.mlp.shared_experts, SHARED
        else:
            yield layer.mlp, FFN
    yield model.decoder.final_layernorm, NORMS


@contextmanager
def told_apart(model: VPGPTModel) -> Iterator[None]:
    """Put a range of torch's profiler around the forward pass of each module, while the block runs."""
    hooks, open_ranges = [], []

    def before(kind: str) -> Any:
        def enter(module: nn.Module, inputs: Any, *_: Any) -> None:
            span = torch.profiler.record_function(RANGE + kind)
            span.__enter__()
            open_ranges.append(span)

        return enter

    def after(module: nn.Module, *_: Any) -> None:
        open_ranges.pop().__exit__(None, None, None)

    for module, kind in kinds_of(model):
        hooks.append(module.register_forward_pre_hook(before(kind), with_kwargs=True))
        # Inner ones are registered later and end sooner.
        hooks.append(module.register_forward_hook(after))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
