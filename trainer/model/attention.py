"""One attention block: projections, QK-norm, rotation, value residual, core attention, output projection."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule
from torch import nn

from trainer.model.backend import CoreAttentionFactory
from trainer.model.config import VPTransformerConfig
from trainer.model.context import CachingCoreAttention, ForwardContext
from trainer.model.fusing import Fuse, unfused
from trainer.model.parallel import sum_gradient_over_tp
from trainer.model.parameters import mark
from trainer.model.positions import rotate
from trainer.model.precision import Float32Parameters, require_float32
from trainer.model.qkv import split_qkv
from trainer.model.tpa import TensorProductQKV
from trainer.model.value_residual import mix_values


@dataclass
class SelfAttentionSubmodules:
    """What depends on the backend."""

    core_attention: CoreAttentionFactory
    fuse: Fuse


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm over the dimensions of a head; its gain is shared by all heads of the layer, on every rank."""

    def __init__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config.kv_channels, eps=config.layernorm_epsilon)
        self.tp_group = pg_collection.tp

    @property
    def gain(self) -> torch.Tensor:
        """`[D]`, its gradient summed over tensor-parallel ranks."""
        return sum_gradient_over_tp(self.weight, self.tp_group)


class SelfAttention(MegatronModule, Float32Parameters):
    """Causal self-attention of one layer, local or global by its number.

    Local layers see a window, rotate q and k, and project with tensor products where TPA is on; global layers
    see all of the document and carry the ALiBi bias. With `rope` every layer is global and rotates.

    Bias, then QK-norm, then rotation, then the value residual: the order matters, and v is neither normalised
    nor rotated.
    """

    float32_names = ("value_residual_logit",)

    def __init__(
        self,
        config: VPTransformerConfig,
        submodules: SelfAttentionSubmodules,
        layer_number: int,
        pg_collection: ProcessGroupCollection,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self.layer_number = layer_number
        self._fuse = submodules.fuse
        self.tp_group = pg_collection.tp
        self.head_dim, self.epsilon = config.kv_channels, config.layernorm_epsilon
        self.groups = config.num_query_groups // self.tp_group.size()
        local = config.is_local(layer_number)
        self.rotates = config.rotation == "rope" or local

        query_width = config.num_attention_heads * config.kv_channels
        self.tensor_product = config.use_tpa and local
        if self.tensor_product:
            self.linear_tpa = TensorProductQKV(config, pg_collection, fuse=submodules.fuse)
        else:
            self.linear_qkv = ColumnParallelLinear(
                config.hidden_size,
                query_width + 2 * config.num_query_groups * config.kv_channels,
                config=config,
                init_method=config.init_method,
                bias=config.attention_bias,
                gather_output=False,
                skip_bias_add=False,
                tp_group=self.tp_group,
            )
        self.q_layernorm = HeadRMSNorm(config, pg_collection) if config.qk_layernorm else None
        self.k_layernorm = HeadRMSNorm(config, pg_collection) if config.qk_layernorm else None
        self.core_attention = submodules.core_attention(
            config=config, layer_number=layer_number, pg_collection=pg_collection
        )
        self.linear_proj = RowParallelLinear(
            query_width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.attention_bias,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )
        self.value_residual = config.value_residual
        self.value_residual_logit: nn.Parameter | None
        if config.value_residual and layer_number > 1:
            self.value_residual_logit = mark(
                nn.Parameter(torch.empty((), dtype=torch.float32)), keep_fp32=True
            )
        else:
            self.register_parameter("value_residual_logit", None)

    def forward(
        self,
        hidden: torch.Tensor,
        attention_mask: ForwardContext,
        inference_context: object | None = None,
        packed_seq_params: object | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attend.

        Args:
            hidden: `[S, B, H]`, normalised.
            attention_mask: The pass's context; the argument is named by Megatron's layer.
            inference_context: Refused.
            packed_seq_params: Refused.
            **_: Megatron's rotary and bias arguments, always None here.

        Returns:
            `[S, B, H]` and the output bias `[H]` (or None), which Megatron's layer adds with the
            residual.

        Raises:
            NotImplementedError: Megatron's own key/value cache or packing was passed.
            RuntimeError: Layer 1's values are missing.
        """
        context = attention_mask
        if inference_context is not None or packed_seq_params is not None:
            raise NotImplementedError(
                "inference_context and packed_seq_params are not supported: documents are given by doc_id, "
                "and earlier tokens by a DecodingCache (trainer.decoding.cache)"
            )
        mixed, _bias = (self.linear_tpa if self.tensor_product else self.linear_qkv)(hidden)
        run = self._fuse if self.training and torch.is_grad_enabled() else unfused
        first_value, logit = self._first_value(context)
        query, key, value = run(prepare_heads)(
            mixed,
            self.groups,
            self.head_dim,
            None if self.q_layernorm is None else self.q_layernorm.gain,
            None if self.k_layernorm is None else self.k_layernorm.gain,
            self.epsilon,
            context.rotation if self.rotates else None,
            first_value,
            logit,
        )
        if self.value_residual and self.value_residual_logit is None:  # layer 1
            context.first_value = value
        if context.cache is None:
            attended = self.core_attention(query, key, value, context.documents)
        else:
            core = cast(CachingCoreAttention, self.core_attention)
            attended = context.cache.attend(self.layer_number, core, query, key, value, context.documents)
        output, bias = self.linear_proj(attended)
        return output, bias

    def _first_value(self, context: ForwardContext) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Layer 1's values and the logit that mixes them in; None twice where nothing is mixed."""
        if self.value_residual_logit is None:
            return None, None
        if context.first_value is None:
            raise RuntimeError(
                f"layer {self.layer_number} needs the values of layer 1 (model.value_residual = true), but "
                "layer 1 has not run in this forward pass; run the layers in order, with one ForwardContext "
                "for all of them"
            )
        logit = require_float32(
            self.value_residual_logit,
            f"decoder.layers.{self.layer_number - 1}.self_attention.value_residual_logit",
        )
        return context.first_value, sum_gradient_over_tp(logit, self.tp_group)


def prepare_heads(
    mixed: torch.Tensor,
    groups: int,
    head_dim: int,
    q_gain: torch.Tensor | None,
    k_gain: torch.Tensor | None,
    eps: float,
    rotation: tuple[torch.Tensor, torch.Tensor] | None,
    first_value: torch.Tensor | None,
    logit: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Make of the projections what the core attends with: split, norm, rotation, value residual.

    Args:
        mixed: `[S, B, (heads + 2 · groups) · D]`, interleaved.
        groups: key/value heads in it.
        head_dim: D.
        q_gain: `[D]`, gain of the queries' RMSNorm, or None.
        k_gain: Of the keys'.
        eps: Of both.
        rotation: Cos and sin, or None in a layer that does not rotate.
        first_value: `[S, B, groups, D]`, or None where no values are mixed in.
        logit: ω, with `first_value`.

    Returns:
        Query `[S, B, heads, D]`, key and value `[S, B, groups, D]`.
    """
    query, key, value = split_qkv(mixed, groups, head_dim)
    if q_gain is not None and k_gain is not None:
        query = nn.functional.rms_norm(query, (head_dim,), q_gain, eps)
        key = nn.functional.rms_norm(key, (head_dim,), k_gain, eps)
    if rotation is not None:
        query, key = rotate(query, rotation), rotate(key, rotation)
    if first_value is not None and logit is not None:
        value = mix_values(value, first_value, logit)
    return query, key, value
