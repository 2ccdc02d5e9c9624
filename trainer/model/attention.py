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
from trainer.model.parallel import sum_gradient_over_tp
from trainer.model.parameters import mark
from trainer.model.positions import rotate
from trainer.model.precision import Float32Parameters, require_float32
from trainer.model.qkv import split_qkv
from trainer.model.tpa import TensorProductQKV
from trainer.model.value_residual import mix_values


@dataclass
class SelfAttentionSubmodules:
    """The one part that depends on the backend."""

    core_attention: CoreAttentionFactory


class HeadRMSNorm(nn.RMSNorm):
    """RMSNorm over the dimensions of a head; its gain is shared by all heads of the layer, on every rank."""

    def __init__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config.kv_channels, eps=config.layernorm_epsilon)
        self.tp_group = pg_collection.tp

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise `x` `[S, B, heads, D]` over D."""
        gain = sum_gradient_over_tp(self.weight, self.tp_group)
        return nn.functional.rms_norm(x, self.normalized_shape, gain, self.eps)


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
        self.tp_group = pg_collection.tp
        self.head_dim = config.kv_channels
        self.groups = config.num_query_groups // self.tp_group.size()
        local = config.is_local(layer_number)
        self.rotates = config.rotation == "rope" or local

        query_width = config.num_attention_heads * config.kv_channels
        self.tensor_product = config.use_tpa and local
        if self.tensor_product:
            self.linear_tpa = TensorProductQKV(config=config, pg_collection=pg_collection)
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
        query, key, value = split_qkv(mixed, self.groups, self.head_dim)
        if self.q_layernorm is not None and self.k_layernorm is not None:
            query, key = self.q_layernorm(query), self.k_layernorm(key)
        if self.rotates:
            assert context.rotation is not None
            query, key = rotate(query, context.rotation), rotate(key, context.rotation)
        if self.value_residual:
            value = self._with_first_value(value, context)
        if context.cache is None:
            attended = self.core_attention(query, key, value, context.doc_id)
        else:
            core = cast(CachingCoreAttention, self.core_attention)
            attended = context.cache.attend(self.layer_number, core, query, key, value, context.doc_id)
        output, bias = self.linear_proj(attended)
        return output, bias

    def _with_first_value(self, value: torch.Tensor, context: ForwardContext) -> torch.Tensor:
        if self.value_residual_logit is None:  # layer 1
            context.first_value = value
            return value
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
        return mix_values(value, context.first_value, sum_gradient_over_tp(logit, self.tp_group))
