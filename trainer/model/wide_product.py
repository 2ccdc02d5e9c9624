"""A product of bfloat16 operands with a float32 result, and gradients that lose nothing to bfloat16.

A router's logits are float32. Its weights and the hidden states are bfloat16 in a bfloat16 model, and a
product of two such numbers is a float32 number, so that converting both first and multiplying in float32 buys
nothing but another order of summation: tensor cores add up the same products in float32, eight times as fast.
On the way back one operand, the gradient of the logits, is float32 itself; it is split into two bfloat16
numbers, which leave out less than 2⁻¹⁶ of it, before results that are rounded to bfloat16 at 2⁻⁹.
"""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.model.fusing import fused, unfused
from trainer.model.router import linear_in


def wide_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """`hidden Wᵀ + b` in a wide type, as `trainer.model.router.linear_in` computes it.

    Args:
        hidden: `[…, H]`.
        weight: `[E, H]`.
        bias: `[E]` or None.
        dtype: Of the result.

    Returns:
        `[…, E]`.
    """
    if not _narrow(hidden, weight) or dtype != torch.float32:
        return linear_in(hidden, weight, bias, dtype)
    out: Tensor = _WideProduct.apply(hidden.flatten(0, -2), weight)
    out = out.unflatten(0, hidden.shape[:-1])
    return out if bias is None else out + bias.to(dtype)


def _narrow(hidden: Tensor, weight: Tensor) -> bool:
    """Whether both are of a GPU and bfloat16: a CPU multiplies no such numbers into float32."""
    return hidden.is_cuda and hidden.dtype == weight.dtype == torch.bfloat16


class _WideProduct(torch.autograd.Function):
    """`[T, H]` and `[E, H]` to `[T, E]`."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(hidden, weight)
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None]:
        hidden, weight = ctx.saved_tensors
        run = fused if grad.is_cuda else unfused
        halves = run(split)(grad)
        to_hidden = to_weight = None
        if ctx.needs_input_grad[0]:
            to_hidden = halves @ torch.cat((weight, weight))
        if ctx.needs_input_grad[1]:
            both = torch.mm(halves.t(), hidden, out_dtype=torch.float32)
            to_weight = both.unflatten(0, (2, -1)).sum(dim=0).to(weight.dtype)
        return to_hidden, to_weight


def split(wide: Tensor) -> Tensor:
    """Split fp32 `[T, E]` into bf16 `[T, 2 E]` whose halves add up to it but for 2⁻¹⁶."""
    upper = wide.to(torch.bfloat16)
    return torch.cat((upper, (wide - upper.float()).to(torch.bfloat16)), dim=1)
