"""Value residual (Zhou et al. 2024): later layers mix layer 1's values into their own."""

import math

import torch


def initial_logit(init: float, eps: float) -> float:
    """`ω = ln(c / (1 − c))` with `c = clamp(init, ε, 1 − ε)`: a finite logit whose λ can still move."""
    clamped = min(max(init, eps), 1.0 - eps)
    return math.log(clamped / (1.0 - clamped))


def mix_values(value: torch.Tensor, first_value: torch.Tensor, logit: torch.Tensor) -> torch.Tensor:
    """`λ v + (1 − λ) v₁` with `λ = σ(ω)`, in fp32, cast back.

    In bf16 σ(4.6) rounds so that 1 − λ and its gradient lose most of their digits, hence fp32 throughout.

    Args:
        value: This layer's values `[S, B, groups, D]`.
        first_value: Layer 1's values, same shape, not detached: later layers train it.
        logit: ω, fp32, 0-dimensional.
    """
    mixing = torch.sigmoid(logit)
    return (mixing * value.float() + (1.0 - mixing) * first_value.float()).to(value.dtype)
