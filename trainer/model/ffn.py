"""The dense feed-forward network: `W₂ relu(W₁ z + b₁)² + b₂`."""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.module import MegatronModule

from trainer.model.config import VPTransformerConfig, squared_relu
from trainer.model.fusing import Fuse, unfused


class DenseFFN(MegatronModule):
    """FFN of a dense layer, and (with its own width) the shared expert of an MoE layer."""

    def __init__(
        self,
        config: VPTransformerConfig,
        pg_collection: ProcessGroupCollection,
        hidden_width: int | None = None,
        *,
        fuse: Fuse = unfused,
        **_: Any,
    ) -> None:
        super().__init__(config=config)
        self._fuse = fuse
        width = hidden_width or config.dense_ffn_hidden_size or config.ffn_hidden_size
        self.tp_group = pg_collection.tp
        self.linear_fc1 = ColumnParallelLinear(
            config.hidden_size,
            width,
            config=config,
            init_method=config.init_method,
            bias=config.add_bias_linear,
            gather_output=False,
            skip_bias_add=fuse is not unfused,  # left to `activate`
            tp_group=self.tp_group,
        )
        self.linear_fc2 = RowParallelLinear(
            width,
            config.hidden_size,
            config=config,
            init_method=config.output_layer_init_method,
            bias=config.add_bias_linear,
            input_is_parallel=True,
            skip_bias_add=True,
            tp_group=self.tp_group,
        )

    def forward(
        self, hidden: torch.Tensor, padding_mask: torch.Tensor | None = None, **_: Any
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`[S, B, H]` to `[S, B, H]` and the output bias `[H]` (or None), still to be added.

        `padding_mask` is Megatron's argument for MoE layers; a dense FFN treats all tokens alike.
        """
        inner, bias = self.linear_fc1(hidden)
        run = self._fuse if self.training and torch.is_grad_enabled() else unfused
        output, bias = self.linear_fc2(run(activate)(inner, bias))
        return output, bias


def activate(inner: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`relu(x + b)²`, `[…, F]`."""
    return squared_relu(inner if bias is None else inner + bias)
