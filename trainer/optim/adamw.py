"""The AdamW step for a list of tensors (Loshchilov and Hutter, 2019)."""

from collections.abc import Sequence

import torch


def adamw_(
    weights: Sequence[torch.Tensor],
    gradients: Sequence[torch.Tensor],
    exp_avgs: Sequence[torch.Tensor],
    exp_avg_sqs: Sequence[torch.Tensor],
    *,
    step: int,
    lr: float,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
) -> None:
    """Apply one AdamW step in place.

    m ← β₁m + (1−β₁)g,  v ← β₂v + (1−β₂)g²,  Θ ← Θ(1−lr·wd) − lr · m̂ / (√v̂ + ε), with bias-corrected m̂ and v̂.

    Args:
        weights: float32 master weights.
        gradients: float32, of the same shapes.
        exp_avgs: m, float32.
        exp_avg_sqs: v, float32.
        step: Number of this step, counted from 1.
        lr: Learning rate.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to √v̂.
        weight_decay: Decoupled decay; 0 leaves the weights alone.
    """
    if not weights:
        return
    torch._foreach_lerp_(list(exp_avgs), list(gradients), 1 - beta1)
    torch._foreach_mul_(list(exp_avg_sqs), beta2)
    torch._foreach_addcmul_(list(exp_avg_sqs), list(gradients), list(gradients), value=1 - beta2)
    if weight_decay:
        torch._foreach_mul_(list(weights), 1 - lr * weight_decay)
    denominators = torch._foreach_sqrt(list(exp_avg_sqs))
    torch._foreach_div_(denominators, (1 - beta2**step) ** 0.5)
    torch._foreach_add_(denominators, eps)
    torch._foreach_addcdiv_(list(weights), list(exp_avgs), denominators, value=-lr / (1 - beta1**step))
