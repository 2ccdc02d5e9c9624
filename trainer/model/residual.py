"""The stream that layers read from and add to: norms, sums, and their gradients, in few passes over it.

Operation by operation a layer reads and writes the stream a dozen times each way, with a sum of its own for
every bias and for every place that a gradient comes back from. Here a norm hands on what it was given beside
what it made of it, so that both gradients come back to it and are added while one of them is computed; and a
product's bias and the stream are added in one go.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from trainer.model.config import VPTransformerConfig
from trainer.model.fusing import Fuse, unfused

Sum = Callable[[tuple[Tensor, Tensor | None], Tensor, float], Tensor]
"""Adds an output with its bias to the stream; the number is a dropout's, which there is none of."""


class ResidualNorm(nn.RMSNorm):
    """RMSNorm of the stream: `x / √(mean(x²) + ε) · g`, and in a training pass the stream beside it.

    Megatron's layer takes such a pair and adds its output to the second of it.
    """

    def __init__(
        self, config: VPTransformerConfig, hidden_size: int, eps: float, *, fuse: Fuse = unfused, **_: Any
    ) -> None:
        super().__init__(hidden_size, eps=eps)
        self._fuse = fuse

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:  # type: ignore[override]
        """`[…, H]` to `[…, H]`, in a training pass with the stream itself as the second of a pair."""
        if not (self.training and torch.is_grad_enabled()):
            return super().forward(x)
        pair: tuple[Tensor, Tensor] = _Norm.apply(self._fuse, x, self.weight, self.eps)
        return pair


def residual_sum(fuse: Fuse) -> Callable[[bool, bool], Sum]:
    """Return what fills the slot of Megatron's bias, dropout and addition.

    Args:
        fuse: Of the backend.
    """

    def choose(training: bool, _fusion: bool) -> Sum:
        def add(output: tuple[Tensor, Tensor | None], residual: Tensor, _dropout: float) -> Tensor:
            run = fuse if training and torch.is_grad_enabled() else unfused
            return run(add_output)(*output, residual)

        return add

    return choose


def add_output(output: Tensor, bias: Tensor | None, residual: Tensor) -> Tensor:
    """`x + y + b`, `[…, H]`."""
    return residual + (output if bias is None else output + bias)


class _Norm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, fuse: Fuse, x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        out, inverse = fuse(normalize)(x, gain, eps)
        ctx.fuse = fuse
        ctx.save_for_backward(x, gain, inverse)
        return out, x.view_as(x)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, to_out: Tensor, to_stream: Tensor) -> tuple[Tensor | None, ...]:
        return None, *ctx.fuse(normalize_backward)(to_out, to_stream, *ctx.saved_tensors), None


def normalize(x: Tensor, gain: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Return the normalised `[…, H]` in x's type and `1 / √(mean(x²) + ε)` in fp32, `[…, 1]`."""
    wide = x.float()
    inverse = (wide.square().mean(dim=-1, keepdim=True) + eps).rsqrt()
    return (wide * inverse * gain.float()).to(x.dtype), inverse


def normalize_backward(
    to_out: Tensor, to_stream: Tensor, x: Tensor, gain: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """Gradients of the stream, those of both uses added up, and of the gain.

    With `n = x / √(mean(x²) + ε)`, `a = g · ∂out`: `∂x = (a − n · mean(a · n)) / √(mean(x²) + ε)`.
    """
    wide, normal = to_out.float(), x.float() * inverse
    scaled = wide * gain.float()
    to_x = inverse * (scaled - normal * (scaled * normal).mean(dim=-1, keepdim=True))
    to_gain = (wide * normal).flatten(0, -2).sum(dim=0)
    return (to_x + to_stream.float()).to(x.dtype), to_gain.to(gain.dtype)
