"""Routed experts by grouped matrix products: the `fused` backend's, without a word from the device.

The reference asks the device how many rows each expert has and runs them one after another, hundreds of small
products a layer. Here the counts stay on the device: rows are sorted by expert, with those of padding last,
and one product takes the matrices of all experts, told by `offsets` where each one's rows end. Shapes do not
depend on the routing, so a pass can be captured in a CUDA graph.

On a GPU the products are the kernels of `trainer.model.grouped_products`, which do what stands between them
too; the sums over a token's choices are left to torch's compiler in training passes, and run operation by
operation elsewhere, where shapes vary. On a CPU it is torch's `grouped_mm`, and each step a function here.
"""

from typing import Any

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import grouped_mm

from trainer.contract.schema.base import ConfigError
from trainer.model.config import VPTransformerConfig, squared_relu
from trainer.model.dispatch import sum_choices
from trainer.model.experts import StackedExperts
from trainer.model.fusing import fused, unfused
from trainer.model.grouped_products import KernelFFN
from trainer.model.pair_sort import SortedPairs, sort_pairs

ALIGNMENT = 16
"""Bytes that the rows of a grouped product's operands must be a multiple of."""


class GroupedExperts(StackedExperts):
    """The same experts, all of them in two grouped products.

    Raises:
        ConfigError: A width cannot be aligned as these products ask.
    """

    def __init__(self, config: VPTransformerConfig, pg_collection: ProcessGroupCollection) -> None:
        super().__init__(config, pg_collection)
        if self.weight1.is_meta:  # shapes alone
            return
        step = ALIGNMENT // self.weight1.element_size()
        for key, width in (
            ("model.hidden_size", config.hidden_size),
            ("model.ffn_hidden_size", config.moe_ffn_hidden_size),
        ):
            if width % step:
                raise ConfigError(
                    f"{key} = {width}: grouped products take multiples of {step} in this dtype; set "
                    "training.backend = 'reference'"
                )

    def forward(self, tokens: Tensor, weights: Tensor, chosen: Tensor) -> Tensor:
        """Take each token to its experts and add up what they return; see `StackedExperts.forward`."""
        if self.ep_group.size() > 1:  # how much each rank sends is asked of the device anyway
            return super().forward(tokens, weights, chosen)
        return self._of_pairs(tokens, weights, sort_pairs(chosen.reshape(-1), self.num_experts))

    def apply_to_rows(self, rows: Tensor, weights: Tensor, counts: list[int]) -> Tensor:
        """Apply each of this rank's experts to its rows; see `StackedExperts.apply_to_rows`."""
        if not rows.shape[0]:
            return super().apply_to_rows(rows, weights, counts)
        experts = torch.arange(len(counts), device=rows.device)
        expert = experts.repeat_interleave(torch.tensor(counts, device=rows.device), output_size=sum(counts))
        return self._of_pairs(rows, weights.unsqueeze(1), sort_pairs(expert, len(counts)))

    def _of_pairs(self, tokens: Tensor, weights: Tensor, pairs: SortedPairs) -> Tensor:
        matrices = self.weight1, self.bias1, self.weight2, self.bias2
        out: Tensor
        if not uses_kernels(tokens):
            out = _GroupedFFN.apply(tokens, weights, pairs, *matrices)
            return out
        run = fused if tokens.is_cuda and self.training and torch.is_grad_enabled() else unfused
        out = KernelFFN.apply(run(combine), run(gather), tokens, weights, pairs, *matrices)
        return out


def uses_kernels(tokens: Tensor) -> bool:
    """Whether a layer runs by the kernels of `trainer.model.grouped_products`, which take a GPU."""
    return tokens.is_cuda


class _GroupedFFN(torch.autograd.Function):
    """`Σ_k W₂ (p relu(W₁ z + b₁)²) + p b₂` of each token, keeping `z` and each pair's `W₁ z` alone.

    Rows of a grouped product that belong to nobody are undefined, so whatever reads a product masks them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        tokens: Tensor,
        weights: Tensor,
        pairs: SortedPairs,
        weight1: Tensor,
        bias1: Tensor | None,
        weight2: Tensor,
        bias2: Tensor | None,
    ) -> Tensor:
        order, inverse, offsets, expert = pairs
        inner = grouped_mm(tokens[order // weights.shape[1]], weight1.transpose(1, 2), offs=offsets)
        weighted = activate(inner, bias1, weights, order, offsets, expert)
        rows = grouped_mm(weighted, weight2.transpose(1, 2), offs=offsets)
        ctx.save_for_backward(tokens, weights, weight1, bias1, weight2, bias2, *pairs, inner)
        return combine(rows, bias2, weights, inverse, offsets, expert)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        tokens, weights, weight1, bias1, weight2, bias2, order, inverse, offsets, expert, inner = (
            ctx.saved_tensors
        )
        topk = weights.shape[1]
        of_rows = spread(grad, order, offsets, topk)
        to_weighted = grouped_mm(of_rows, weight2, offs=offsets)
        to_inner, weighted, to_pairs = activate_backward(
            to_weighted, inner, of_rows, bias1, bias2, weights, order, offsets, expert
        )
        to_rows = grouped_mm(to_inner, weight1, offs=offsets)
        p = weights.reshape(-1)[order].unsqueeze(1)
        return (
            gather(to_rows, inverse, offsets, topk),
            to_pairs[inverse].view(weights.shape),
            None,
            grouped_mm(to_inner.t(), tokens[order // topk], offs=offsets),
            None if bias1 is None else _sum_by_expert(torch.ones_like(p), to_inner, offsets),
            grouped_mm(of_rows.t(), weighted, offs=offsets),
            None if bias2 is None else _sum_by_expert(p, of_rows, offsets),
        )


def activate(
    inner: Tensor, bias: Tensor | None, weights: Tensor, order: Tensor, offsets: Tensor, expert: Tensor
) -> Tensor:
    """`p relu(W₁ z + b₁)²` of each row `[n, F]`; zero for rows of nobody."""
    value = inner if bias is None else inner + bias[expert]
    p = weights.reshape(-1)[order].unsqueeze(1)
    return _live(squared_relu(value).float() * p, offsets).to(inner.dtype)


def combine(
    rows: Tensor, bias: Tensor | None, weights: Tensor, inverse: Tensor, offsets: Tensor, expert: Tensor
) -> Tensor:
    """`[n, H]` to `[T, H]`: the sum of each token's rows, in fp32 and in the order of its choices."""
    found = _of_each_pair(rows, inverse, offsets)
    if bias is not None:
        p = torch.where(inverse < offsets[-1], weights.reshape(-1), 0.0).unsqueeze(1)
        found = found + (p * bias[expert[inverse]].float()).to(rows.dtype)
    return sum_choices(found, weights.shape[1])


def spread(grad: Tensor, order: Tensor, offsets: Tensor, topk: int) -> Tensor:
    """`[T, H]` to `[n, H]`: each pair's copy of its token's gradient."""
    return _live(grad[order // topk], offsets)


def gather(rows: Tensor, inverse: Tensor, offsets: Tensor, topk: int) -> Tensor:
    """`[n, H]` to `[T, H]`: the sum of each token's rows."""
    return sum_choices(_of_each_pair(rows, inverse, offsets), topk)


def activate_backward(
    to_weighted: Tensor,
    inner: Tensor,
    of_rows: Tensor,
    bias1: Tensor | None,
    bias2: Tensor | None,
    weights: Tensor,
    order: Tensor,
    offsets: Tensor,
    expert: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `W₁ z + b₁` `[n, F]` and of p `[n]`, and once more what `activate` returned."""
    p = weights.reshape(-1)[order].unsqueeze(1)
    value = inner if bias1 is None else inner + bias1[expert]
    activated = squared_relu(value).float()
    wide = _live(to_weighted, offsets).float()
    to_pairs = (wide * activated).sum(dim=1)
    if bias2 is not None:
        to_pairs = to_pairs + (of_rows.float() * bias2[expert].float()).sum(dim=1)
    to_inner = _live(wide * p * 2.0 * value.float().relu(), offsets).to(inner.dtype)
    to_pairs = _live(to_pairs.unsqueeze(1), offsets).squeeze(1)
    return to_inner, activate(inner, bias1, weights, order, offsets, expert), to_pairs


def _of_each_pair(rows: Tensor, inverse: Tensor, offsets: Tensor) -> Tensor:
    """Return the row of each pair, zero where it is nobody's."""
    return torch.where((inverse < offsets[-1]).unsqueeze(1), rows[inverse], 0.0)


def _live(rows: Tensor, offsets: Tensor) -> Tensor:
    """Put zeros into rows of nobody: not a product, since what stands there may be NaN."""
    live = torch.arange(rows.shape[0], device=rows.device) < offsets[-1]
    return torch.where(live.unsqueeze(1), rows, 0.0)


def _sum_by_expert(factor: Tensor, rows: Tensor, offsets: Tensor) -> Tensor:
    """Return `Σ factor_i rows_i` over each expert's rows, `[E, width]`.

    As a grouped product, whose order of summation is fixed, unlike that of an `index_add` on a GPU.
    """
    columns = torch.nn.functional.pad(
        factor.to(rows.dtype), (0, ALIGNMENT // rows.element_size() - factor.shape[1])
    )
    return grouped_mm(columns.t(), rows, offs=offsets)[:, 0]
