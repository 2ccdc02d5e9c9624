"""What tensor parallelism asks of modules that Megatron's linears do not cover."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.mappings import copy_to_tensor_model_parallel_region


def sum_gradient_over_tp(tensor: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Identity whose gradient is summed over the tensor-parallel ranks.

    A replicated parameter that acts on this rank's heads only (norm gains of q and k, ω, `log_freq`, TPA's
    `b` factors) gets a part of its gradient on every rank. Passed through here, it gets the whole gradient
    on each of them, so nobody has to know later which parameters are special.
    """
    if group.size() == 1:
        return tensor
    return copy_to_tensor_model_parallel_region(tensor, group=group)


class _SplitRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group, ctx.rows = group, x.shape[0]
        return _own_rows(x, group)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _all_rows(grads[0], ctx.group, ctx.rows), None


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, group: dist.ProcessGroup, rows: int) -> torch.Tensor:
        ctx.group = group
        return _all_rows(x, group, rows)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        return _own_rows(grads[0], ctx.group), None, None


def split_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """Return this rank's share of the rows of a replicated `[T, …]`; the gradient is gathered back.

    Shares are `ceil(T / n)` rows; the last ranks may have fewer, or none.
    """
    return x if group.size() == 1 else _SplitRows.apply(x, group)


def gather_rows(x: torch.Tensor, group: dist.ProcessGroup, rows: int) -> torch.Tensor:
    """Return the replicated `[rows, …]` from each rank's share of `split_rows`; the gradient is split."""
    return x if group.size() == 1 else _GatherRows.apply(x, group, rows)


def _share(rows: int, group: dist.ProcessGroup) -> int:
    return -(-rows // group.size())


def _own_rows(x: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    share = _share(x.shape[0], group)
    return x[group.rank() * share : (group.rank() + 1) * share].contiguous()


def _all_rows(x: torch.Tensor, group: dist.ProcessGroup, rows: int) -> torch.Tensor:
    share = _share(rows, group)
    padded = x.new_zeros(share, *x.shape[1:])
    padded[: x.shape[0]] = x
    out = x.new_empty(group.size() * share, *x.shape[1:])
    dist.all_gather_into_tensor(out, padded, group=group)
    return out[:rows]
