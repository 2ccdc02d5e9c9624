"""Tensor-product attention (Zhang et al. 2025): queries, keys and values as contextual low-rank products."""

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.fusing import Fuse, unfused
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

    def __init__(
        self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection, *, fuse: Fuse = unfused
    ) -> None:
        super().__init__(config=config)
        self._fuse = fuse
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
        shared = (sum_gradient_over_tp(b, self.tp_group) for b in (self.b_q, self.b_k, self.b_v))
        matrices = (self.a_q, self.a_k, self.a_v, *shared)
        if self._fuse is unfused or not (self.training and torch.is_grad_enabled()):
            a_q, a_k, a_v, b_q, b_k, b_v = (nn.functional.linear(z, matrix) for matrix in matrices)
            ranks = self.q_rank, self.kv_rank
            return compose_qkv(a_q, a_k, a_v, b_q, b_k, b_v, self.bias, *ranks, summed=False), None
        # One product instead of six, and one gradient of z instead of six to be added up.
        projected = nn.functional.linear(z, torch.cat(matrices))
        widths = tuple(matrix.shape[0] for matrix in matrices)
        return self._fuse(compose_projected)(projected, widths, self.bias, self.q_rank, self.kv_rank), None

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


def compose_projected(
    projected: torch.Tensor, widths: tuple[int, ...], bias: torch.Tensor | None, q_rank: int, kv_rank: int
) -> torch.Tensor:
    """Compose what one product made of all factors, `[S, B, Σ widths]`; see `compose_qkv`."""
    a_q, a_k, a_v, b_q, b_k, b_v = projected.split(widths, dim=-1)
    return compose_qkv(a_q, a_k, a_v, b_q, b_k, b_v, bias, q_rank, kv_rank, summed=True)


def compose_qkv(
    a_q: torch.Tensor,
    a_k: torch.Tensor,
    a_v: torch.Tensor,
    b_q: torch.Tensor,
    b_k: torch.Tensor,
    b_v: torch.Tensor,
    bias: torch.Tensor | None,
    q_rank: int,
    kv_rank: int,
    *,
    summed: bool,
) -> torch.Tensor:
    """Compose queries, keys and values from their factors, interleave them and add the bias.

    Args:
        a_q: `[S, B, heads · R_q]`; `a_k` and `a_v` `[S, B, groups · R]`.
        a_k: See `a_q`.
        a_v: See `a_q`.
        b_q: `[S, B, R_q · D]`; `b_k` and `b_v` `[S, B, R · D]`.
        b_k: See `b_q`.
        b_v: See `b_q`.
        bias: `[(heads + 2 · groups) · D]` or None.
        q_rank: R_q.
        kv_rank: R.
        summed: Write the products out as sums over ranks, which a compiler fuses, where a library has a tiny
            matrix product for each token.

    Returns:
        `[S, B, (heads + 2 · groups) · D]` in the type of the factors; the sum over ranks accumulates in fp32.
    """

    def compose(a: torch.Tensor, b: torch.Tensor, rank: int) -> torch.Tensor:
        left, right = a.float().unflatten(-1, (-1, rank)), b.float().unflatten(-1, (rank, -1))
        if not summed:
            return left @ right / rank
        terms = [left[..., r, None] * right[..., None, r, :] for r in range(rank)]
        return torch.stack(terms).sum(dim=0) / rank if rank > 8 else sum(terms[1:], terms[0]) / rank

    mixed = interleave_qkv(compose(a_q, b_q, q_rank), compose(a_k, b_k, kv_rank), compose(a_v, b_v, kv_rank))
    return (mixed if bias is None else mixed + bias.float()).to(a_q.dtype)
