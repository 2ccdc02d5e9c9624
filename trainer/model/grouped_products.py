"""An expert layer's products on a GPU, its weights' gradients straight into `main_grad`.

The experts of the full model have some thirty rows each. Products of a library for such groups spend most of
their time on what stands around them: rows gathered first, a bias and an activation after, a gradient in bf16
that is copied into the float32 sum of the step. The kernels of `trainer.model.grouped_kernels` gather as they
read, finish what they have at hand, and write a weight's gradient once, where the optimizer looks for it.

Floating point: products take their operands as they are and sum in float32; `W₁ z` is rounded to the weights'
type, since it is kept for the backward pass; bias, ReLU² and routing weight are applied to it in float32.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.pair_sort import SortedPairs
from trainer.model.parameters import is_written, mark_written
from trainer.model.wide_product import wide_linear

_COLUMNS, _DEPTH = 128, 64
_OUTER_FEW = {"ROWS": 32, "num_warps": 8, "num_stages": 2}
_OUTER_MANY = {"ROWS": 128, "num_warps": 4, "num_stages": 2}
_FEW_ROWS = 96
"""Rows of an expert, on average, up to which they are few."""


class Experts(NamedTuple):
    """The stacked parameters of a layer: `[E, F, H]`, `[E, F]` or None, `[E, H, F]`, `[E, H]` or None."""

    weight1: Tensor
    bias1: Tensor | None
    weight2: Tensor
    bias2: Tensor | None


def inner_rows(
    tokens: Tensor, weights: Tensor, experts: Experts, pairs: SortedPairs
) -> tuple[Tensor, Tensor]:
    """Return `W₁ z` and `p relu(W₁ z + b₁)²` of each row, `[n, F]`; undefined for rows of nobody.

    Args:
        tokens: `[T, H]`.
        weights: fp32 `[T, K]`.
        experts: Of the layer.
        pairs: `n = T · K` of them.
    """
    from trainer.model.grouped_kernels import inner_rows as kernel

    count, width, hidden = experts.weight1.shape
    rows = weights.numel()
    inner = tokens.new_empty(rows, width)
    weighted = torch.empty_like(inner)
    shape = _shape(rows, count, width)
    kernel[_grid(rows, count, width, shape)](
        tokens, experts.weight1, _pointer(experts.bias1, inner), weights, pairs.order, pairs.offsets, inner,
        weighted, HIDDEN=hidden, WIDTH=width, TOPK=weights.shape[1], EXPERTS=count, PADDED=_padded(count),
        BIASED=experts.bias1 is not None, **shape,
    )  # fmt: skip
    return inner, weighted


def outer_rows(rows: Tensor, weight: Tensor, pairs: SortedPairs, *, transposed: bool) -> Tensor:
    """Return `[n, F]` times each row's matrix, `[n, H]`; undefined for rows of nobody.

    Args:
        rows: `[n, F]`.
        weight: `[E, H, F]`, or `[E, F, H]` where `transposed`.
        pairs: Whose rows they are.
        transposed: Which.
    """
    from trainer.model.grouped_kernels import outer_rows as kernel

    count = weight.shape[0]
    hidden, width = (weight.shape[2], weight.shape[1]) if transposed else weight.shape[1:]
    out = rows.new_empty(rows.shape[0], hidden)
    shape = _shape(rows.shape[0], count, hidden)
    steps = {"STEP_K": hidden, "STEP_N": 1} if transposed else {"STEP_K": 1, "STEP_N": width}
    kernel[_grid(rows.shape[0], count, hidden, shape)](
        rows, weight, pairs.offsets, out, HIDDEN=hidden, WIDTH=width, EXPERTS=count, PADDED=_padded(count),
        **steps, **shape,
    )  # fmt: skip
    return out


def inner_gradients(
    grad: Tensor, inner: Tensor, weights: Tensor, experts: Experts, pairs: SortedPairs
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradient of `W₁ z`, what `inner_rows` called weighted, and the gradient of p of each row.

    Args:
        grad: Of the layer's output, `[T, H]`.
        inner: Of `inner_rows`.
        weights: fp32 `[T, K]`.
        experts: Of the layer.
        pairs: Of the pass forward.

    Returns:
        `[n, F]` twice, undefined for rows of nobody, and fp32 `[n]`, 0 for them.
    """
    from trainer.model.grouped_kernels import inner_gradients as kernel

    count, hidden, width = experts.weight1.shape[0], grad.shape[1], inner.shape[1]
    rows = inner.shape[0]
    to_inner, weighted = torch.empty_like(inner), torch.empty_like(inner)
    shape = _shape(rows, count, width)
    grid = _grid(rows, count, width, shape)
    to_pairs = torch.zeros(grid[1], rows, dtype=torch.float32, device=grad.device)
    # Of every token and expert: a plain product is cheaper than another pass over the gathered rows.
    of_bias2 = to_pairs if experts.bias2 is None else wide_linear(grad, experts.bias2, None, torch.float32)
    kernel[grid](
        grad, experts.weight2, inner, _pointer(experts.bias1, inner), of_bias2, weights,
        pairs.order, pairs.offsets, to_inner, weighted, to_pairs, rows, HIDDEN=hidden, WIDTH=width,
        TOPK=weights.shape[1], EXPERTS=count, PADDED=_padded(count), BIASED=experts.bias1 is not None,
        **shape,
    )  # fmt: skip
    return to_inner, weighted, to_pairs.sum(dim=0)


class Gathered(NamedTuple):
    """One side of an outer product: a row for each token, or for each row of the sorted pairs.

    Attributes:
        values: `[T, width]` with K choices a token, or `[n, width]` with 0.
        topk: K or 0.
    """

    values: Tensor
    topk: int


def weight_gradients(
    left: Gathered,
    right: Gathered,
    weight: Tensor,
    bias: Tensor | None,
    pairs: SortedPairs,
    *,
    weights: Tensor | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Sum `left ⊗ right` over each expert's rows, and left alone (times p where `weights` are given).

    Args:
        left: Rows of the gradient of a product.
        right: Rows that its matrices were applied to.
        weight: The matrices, `[E, left, right]`.
        bias: Their biases `[E, left]`, or None.
        pairs: Whose rows they are.
        weights: fp32 `[T, K]`, routing weights.

    Returns:
        The gradients of both in their own type; or None for both, and then they stand in `main_grad`, over
        what stood there if this is the step's first backward pass, added to it otherwise.
    """
    from trainer.model.grouped_kernels import add_outer_products as kernel

    held = [weight] if bias is None else [weight, bias]
    targets = [getattr(parameter, "main_grad", None) for parameter in held]
    written = {is_written(parameter) for parameter in held}  # type: ignore[arg-type]
    direct = all(t is not None for t in targets) and all(p.requires_grad for p in held) and len(written) == 1
    found = targets if direct else [torch.empty_like(parameter) for parameter in held]
    size, width = weight.shape[1:]
    blocks = {"BLOCK_LEFT": min(_COLUMNS, _block(size)), "BLOCK_RIGHT": min(_COLUMNS, _block(width))}
    grid = weight.shape[0], -(-size // blocks["BLOCK_LEFT"]), -(-width // blocks["BLOCK_RIGHT"])
    kernel[grid](
        left.values, right.values, _pointer(weights, pairs.order), pairs.order, pairs.offsets, found[0],
        found[-1], LEFT=size, RIGHT=width, LEFT_TOPK=left.topk, RIGHT_TOPK=right.topk,
        ADD=direct and written == {True}, BIASED=bias is not None,
        WEIGHED=weights is not None, **blocks, **_outer_shape(pairs.order.numel(), weight.shape[0]),
    )  # fmt: skip
    if not direct:
        return found[0], found[1] if bias is not None else None
    mark_written(*held)  # type: ignore[arg-type]
    return None, None


def _shape(rows: int, experts: int, columns: int) -> dict[str, int]:
    """Return the blocks of a product with `columns` columns: their size, warps and stages."""
    return {
        "ROWS": 64,
        "COLUMNS": min(_COLUMNS, _block(columns)),
        "DEPTH": _DEPTH,
        "num_warps": 4,
        "num_stages": 4 if _few(rows, experts) else 3,
    }


def _outer_shape(rows: int, experts: int) -> dict[str, int]:
    """Return how many rows an outer product sums at a time, its warps and stages."""
    return _OUTER_FEW if _few(rows, experts) else _OUTER_MANY


def _few(rows: int, experts: int) -> bool:
    return rows <= _FEW_ROWS * experts


def _grid(rows: int, experts: int, columns: int, shape: dict[str, int]) -> tuple[int, int]:
    """Return how many blocks there can be: every expert may have one that is not full."""
    return rows // shape["ROWS"] + min(rows, experts), -(-columns // shape["COLUMNS"])


def _padded(number: int) -> int:
    """Return the smallest power of two that is not below a number."""
    return 1 << (number - 1).bit_length()


def _block(size: int) -> int:
    """Return the block that a product needs for a size: a power of two, 16 at least."""
    return max(16, _padded(size))


def _pointer(tensor: Tensor | None, other: Tensor) -> Tensor:
    """Return a tensor, or another in the place of one that is not there and will not be read."""
    return other if tensor is None else tensor


class KernelFFN(torch.autograd.Function):
    """What `trainer.model.grouped_experts` computes, by these kernels; it keeps `z` and `W₁ z` alone."""

    @staticmethod
    def forward(
        ctx: Any, combine: Any, gather: Any, tokens: Tensor, weights: Tensor, pairs: SortedPairs, *held: Any
    ) -> Tensor:
        """Take each token to its experts and add up what they return.

        Args:
            ctx: Of the function.
            combine: `grouped_experts.combine`, compiled or not.
            gather: `grouped_experts.gather`, likewise.
            tokens: `[T, H]`.
            weights: fp32 `[T, K]`.
            pairs: Of the tokens' choices.
            held: As `Experts`.
        """
        experts = Experts(*held)
        tokens, weights = tokens.contiguous(), weights.contiguous()
        inner, weighted = inner_rows(tokens, weights, experts, pairs)
        rows = outer_rows(weighted, experts.weight2, pairs, transposed=False)
        ctx.save_for_backward(tokens, weights, inner, *pairs)
        ctx.experts, ctx.gather = experts, gather
        out: Tensor = combine(rows, experts.bias2, weights, pairs.inverse, pairs.offsets, pairs.expert)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        """Back-propagate; see `weight_gradients` for where the experts' gradients go."""
        tokens, weights, inner, *places = ctx.saved_tensors
        pairs, experts, topk = SortedPairs(*places), ctx.experts, weights.shape[1]
        grad = grad.contiguous()
        to_inner, weighted, to_pairs = inner_gradients(grad, inner, weights, experts, pairs)
        to_rows = outer_rows(to_inner, experts.weight1, pairs, transposed=True)
        first: tuple[Tensor | None, Tensor | None] = (None, None)
        second: tuple[Tensor | None, Tensor | None] = (None, None)
        if any(ctx.needs_input_grad[5:7]):
            first = weight_gradients(
                Gathered(to_inner, 0),
                Gathered(tokens, topk),
                experts.weight1,
                experts.bias1,
                pairs,
                weights=None,
            )
        if any(ctx.needs_input_grad[7:9]):
            second = weight_gradients(
                Gathered(grad, topk),
                Gathered(weighted, 0),
                experts.weight2,
                experts.bias2,
                pairs,
                weights=weights,
            )
        to_tokens = ctx.gather(to_rows, pairs.inverse, pairs.offsets, topk)
        return None, None, to_tokens, to_pairs[pairs.inverse].view(weights.shape), None, *first, *second
