"""Bringing tokens to experts and back: sorting, and the exchange between expert-parallel ranks.

Every step is a permutation with a known inverse, so forward and backward are gathers: the same bits in every
run, on CPU and CUDA, where a scatter-add would not be.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.nn.functional as dist_autograd


class _TakePairs(torch.autograd.Function):
    """Rows of tokens for (token, choice) pairs in a given order; the adjoint of `_SumPairs`."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, topk: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.topk = topk
        return _take_pairs(x, order, topk)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        _order, inverse = ctx.saved_tensors
        return _sum_pairs(grads[0], inverse, ctx.topk), None, None, None


class _SumPairs(torch.autograd.Function):
    """Sum of each token's rows; the adjoint of `_TakePairs`."""

    @staticmethod
    def forward(
        ctx: Any, y: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor, topk: int
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        ctx.topk = topk
        return _sum_pairs(y, inverse, topk)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None, None]:
        order, _inverse = ctx.saved_tensors
        return _take_pairs(grads[0], order, ctx.topk), None, None, None


class _Permute(torch.autograd.Function):
    """Rows in another order; the backward uses the inverse order."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(inverse)
        return x[order]

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        (inverse,) = ctx.saved_tensors
        return grads[0][inverse], None, None


def _take_pairs(x: torch.Tensor, order: torch.Tensor, topk: int) -> torch.Tensor:
    return x[order // topk]


def _sum_pairs(y: torch.Tensor, inverse: torch.Tensor, topk: int) -> torch.Tensor:
    # Pairs of padding were cut off the end of the order, so their rows are missing: zeros stand in for them.
    missing = inverse.shape[0] - y.shape[0]
    rows = torch.cat((y, y.new_zeros(missing, *y.shape[1:]))) if missing else y
    return sum_choices(rows[inverse], topk)


def sum_choices(pairs: torch.Tensor, topk: int) -> torch.Tensor:
    """`[T · K, …]` to `[T, …]`: in fp32 and in the order of the choices, as a kernel's accumulator would."""
    return pairs.unflatten(0, (-1, topk)).sum(dim=1, dtype=torch.float32).to(pairs.dtype)


@dataclass
class Assignment:
    """(token, choice) pairs sorted by expert.

    Attributes:
        order: int64 `[n]`, pair number `token · K + choice` of each sorted row; padding is left out.
        inverse: int64 `[T · K]`, sorted row of each pair; rows `>= n` are padding's.
        counts: Rows of each expert, a Python list of length E.
        topk: K.
    """

    order: torch.Tensor
    inverse: torch.Tensor
    counts: list[int]
    topk: int

    def take(self, tokens: torch.Tensor) -> torch.Tensor:
        """`[T, …]` to `[n, …]`: a row for every pair, sorted by expert."""
        out: torch.Tensor = _TakePairs.apply(tokens, self.order, self.inverse, self.topk)
        return out

    def take_weights(self, weights: torch.Tensor) -> torch.Tensor:
        """`[T, K]` to `[n]`: each pair's weight, sorted by expert."""
        out: torch.Tensor = _TakePairs.apply(weights.reshape(-1), self.order, self.inverse, 1)
        return out

    def combine(self, rows: torch.Tensor) -> torch.Tensor:
        """`[n, …]` to `[T, …]`: the sum of each token's rows (zero for padding)."""
        out: torch.Tensor = _SumPairs.apply(rows, self.order, self.inverse, self.topk)
        return out


def assign(chosen: torch.Tensor, num_experts: int) -> Assignment:
    """Sort the pairs of `chosen` int64 `[T, K]` by expert, stably; index E is nobody."""
    flat = chosen.reshape(-1)
    order = torch.argsort(flat, stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0], device=order.device)
    edges = torch.searchsorted(flat[order], torch.arange(num_experts + 1, device=flat.device))
    counts: list[int] = edges.diff().tolist()
    return Assignment(order[: sum(counts)], inverse, counts, chosen.shape[1])


class ExpertExchange:
    """One all-to-all over the expert-parallel group and its way back.

    Rank r holds the experts `[r · E/n, (r + 1) · E/n)`. Rows arrive grouped by sender and are re-sorted by
    expert.
    """

    def __init__(self, counts: list[int], group: dist.ProcessGroup, device: torch.device) -> None:
        self.group = group
        ranks = group.size()
        sent = torch.tensor(counts, dtype=torch.int64, device=device).view(ranks, -1)  # [rank, its experts]
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        self.send_splits: list[int] = sent.sum(dim=1).tolist()
        self.receive_splits: list[int] = received.sum(dim=1).tolist()
        self.counts: list[int] = received.sum(dim=0).tolist()
        expert = torch.arange(received.shape[1], device=device).repeat(ranks)
        self._order = torch.argsort(expert.repeat_interleave(received.reshape(-1)), stable=True)
        self._inverse = torch.empty_like(self._order)
        self._inverse[self._order] = torch.arange(self._order.shape[0], device=device)

    def to_experts(self, rows: torch.Tensor) -> torch.Tensor:
        """Send this rank's sorted rows to the rows of this rank's experts, sorted by expert."""
        arrived = _all_to_all(rows, self.receive_splits, self.send_splits, self.group)
        out: torch.Tensor = _Permute.apply(arrived, self._order, self._inverse)
        return out

    def back(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the experts' rows back to the ranks that sent them, in the order in which they were sent."""
        by_sender: torch.Tensor = _Permute.apply(rows, self._inverse, self._order)
        return _all_to_all(by_sender, self.send_splits, self.receive_splits, self.group)


def _all_to_all(
    x: torch.Tensor, out_splits: list[int], in_splits: list[int], group: dist.ProcessGroup
) -> torch.Tensor:
    out = x.new_empty(sum(out_splits), *x.shape[1:])
    result: torch.Tensor = dist_autograd.all_to_all_single(
        out, x.contiguous(), out_splits, in_splits, group=group
    )
    return result
