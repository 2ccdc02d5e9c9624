"""Sorting (token, choice) pairs by expert without asking the device for anything.

A stable counting sort: a pair's row is the number of pairs of smaller experts, and of its own expert before
it. On a GPU it is one kernel, a program an expert, each of which looks at all pairs; a library's sort of
64-bit keys takes a dozen.
"""

from typing import NamedTuple

import torch
from torch import Tensor

_BLOCK = 4096
"""Pairs that a program looks at at a time."""


class SortedPairs(NamedTuple):
    """Pairs sorted by expert, those of nobody last.

    Attributes:
        order: int64 `[n]`, pair of each row.
        inverse: int64 `[n]`, row of each pair.
        offsets: int32 `[E]`, where the rows of each expert end.
        expert: int64 `[n]`, expert of each row; E − 1 for a row of nobody.
    """

    order: Tensor
    inverse: Tensor
    offsets: Tensor
    expert: Tensor


def sort_pairs(chosen: Tensor, num_experts: int) -> SortedPairs:
    """Sort pairs stably by expert.

    Args:
        chosen: int64 `[n]`, expert of each pair; `num_experts` is nobody.
        num_experts: E.
    """
    if chosen.is_cuda:
        return _counted(chosen, num_experts)
    experts, order = chosen.sort(stable=True)
    inverse = torch.empty_like(order)
    inverse[order] = torch.arange(order.shape[0])
    offsets = torch.searchsorted(experts, torch.arange(num_experts), right=True, out_int32=True)
    return SortedPairs(order, inverse, offsets, experts.clamp(max=num_experts - 1))


def _counted(chosen: Tensor, num_experts: int) -> SortedPairs:
    from trainer.model.pair_sort_kernel import count_and_place

    pairs = chosen.numel()
    order, inverse, expert = (torch.empty_like(chosen) for _ in range(3))
    offsets = torch.empty(num_experts, dtype=torch.int32, device=chosen.device)
    blocks = -(-pairs // _BLOCK)
    count_and_place[(num_experts + 1,)](
        chosen, order, inverse, expert, offsets, pairs, num_experts, BLOCKS=blocks, BLOCK=_BLOCK
    )
    return SortedPairs(order, inverse, offsets, expert)
