"""Which module fills which slot of Megatron's block and layers."""

import functools
from typing import Any

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from trainer.model.attention import SelfAttention, SelfAttentionSubmodules
from trainer.model.backend import Backend
from trainer.model.config import VPTransformerConfig
from trainer.model.ffn import DenseFFN
from trainer.model.fusing import unfused
from trainer.model.moe import MoELayer
from trainer.model.residual import ResidualNorm, residual_sum


def block_spec(config: VPTransformerConfig, backend: Backend) -> TransformerBlockSubmodules:
    """One spec per layer: every layer's attention is our own, its FFN dense or routed.

    Args:
        config: Of the model.
        backend: Its parts.
    """
    attention = ModuleSpec(
        module=SelfAttention, submodules=SelfAttentionSubmodules(backend.core_attention, backend.fuse)
    )
    routed, dense = (
        functools.partial(
            MoELayer,
            experts=backend.experts,
            route=backend.route,
            linear=backend.router_linear,
            fuse=backend.fuse,
        ),
        functools.partial(DenseFFN, fuse=backend.fuse),
    )
    norm: Any = WrappedTorchNorm
    add: Any = get_bias_dropout_add
    if backend.fuse is not unfused:
        norm, add = functools.partial(ResidualNorm, fuse=backend.fuse), residual_sum(backend.fuse)

    def layer(number: int) -> ModuleSpec:
        return ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=norm,
                self_attention=attention,
                self_attn_bda=add,
                pre_mlp_layernorm=norm,
                mlp=routed if number in config.moe_layers else dense,
                mlp_bda=add,
            ),
        )

    return TransformerBlockSubmodules(
        layer_specs=[layer(number) for number in range(1, config.num_layers + 1)], layer_norm=WrappedTorchNorm
    )
