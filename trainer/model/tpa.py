"""Tensor-product attention (Zhang et al. 2025): queries, keys and values as contextual low-rank products."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.parallel import sum_gradient_over_tp
from trainer.model.parameters import mark
from trainer.model.qkv import interleave_qkv

_ROW_SPLIT = {"a_q": 0, "a_k": 0, "a_v": 0, "bias": 0}


class TensorProductQKV(MegatronModule):
    """`q[h] = (1/R_q) Σ_r a_q(z)[h, r] · b_q(z)[r]`, keys and values likewise, plus one bias at the end.

    Both factors are linear in the input and have no bias of their own. The rows of every `a` are heads and
    are split over tensor-parallel ranks; the `b` factors are needed whole on each rank, so they are
    replicated.

    The output has the interleaved layout of the dense projection (`trainer.model.qkv`), which makes the
    two interchangeable.
    """

    def __init__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection, **_: Any) -> None:
        super().__init__(config=config)
        self.tp_group: dist.ProcessGroup = pg_collection.tp
        size = self.tp_group.size()
        self.heads, self.groups = config.num_attention_heads // size, config.num_query_groups // size
        self.head_dim = config.kv_channels
        self.q_rank, self.kv_rank = config.tpa_q_rank or 0, config.tpa_rank or 0  # above 0, by the config

        def factor(rows: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(rows, config.hidden_size, dtype=config.params_dtype))

        self.a_q = factor(self.heads * self.q_rank)
        self.a_k = factor(self.groups * self.kv_rank)
        self.a_v = factor(self.groups * self.kv_rank)
        self.b_q = factor(self.q_rank * self.head_dim)
        self.b_k = factor(self.kv_rank * self.head_dim)
        self.b_v = factor(self.kv_rank * self.head_dim)
        self.bias: nn.Parameter | None
        if config.attention_bias:
            width = (self.heads + 2 * self.groups) * self.head_dim
            self.bias = nn.Parameter(torch.empty(width, dtype=config.params_dtype))
        else:
            self.register_parameter("bias", None)
        for name in _ROW_SPLIT:
            if (parameter := getattr(self, name)) is not None:
                mark(parameter, partition_dim=_ROW_SPLIT[name])

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Compose.

        Args:
            hidden: `[S, B, H]`, normalised.

        Returns:
            `[S, B, (heads + 2 · groups) · D]` of this rank in the parameters' dtype, and no bias left to
            add.
        """
        z = sum_gradient_over_tp(hidden.to(self.a_q.dtype), self.tp_group)
        query = self._compose(z, self.a_q, self.b_q, self.heads, self.q_rank)
        key = self._compose(z, self.a_k, self.b_k, self.groups, self.kv_rank)
        value = self._compose(z, self.a_v, self.b_v, self.groups, self.kv_rank)
        mixed = interleave_qkv(query, key, value)
        if self.bias is not None:
            mixed = mixed + self.bias.float()
        return mixed.to(z.dtype), None

    def _compose(
        self, z: torch.Tensor, a: torch.Tensor, b: torch.Tensor, heads: int, rank: int
    ) -> torch.Tensor:
        """Fp32 `[S, B, heads, D]`; the sum over ranks accumulates in fp32."""
        left = nn.functional.linear(z, a).float().unflatten(-1, (heads, rank))
        right = nn.functional.linear(z, sum_gradient_over_tp(b, self.tp_group)).float()
        return left @ right.unflatten(-1, (rank, self.head_dim)) / rank

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Return sharded tensors: `a` factors and bias are split by row, `b` factors replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            _ROW_SPLIT,
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
