"""The NorMuon step for a batch of equally shaped matrices.

For one matrix with gradient G, momentum M and row statistic v (all float32), as in NorMuon (Li et al., 2025):

    M ← μ M + (1−μ) G                       exponential moving average
    U ← (1−μ) G + μ M                       Nesterov, with the new M
    O ← PolarExpress(U)
    r_i ← mean_j O_ij²                      one number per row
    v ← β₂ v + (1−β₂) r                     starts at zero, no bias correction
    Õ ← O / √(v + ε)
    Δ ← Õ · ‖O‖_F / max(‖Õ‖_F, ε) · √max(1, m/n)

The caller applies Θ ← Θ (1 − lr·wd) − lr·Δ. Rows are always the statistic's axis, whatever the shape.
"""

from collections.abc import Callable, Sequence

import torch

Orthogonalize = Callable[[torch.Tensor], torch.Tensor]


def nesterov_momentum(
    gradients: Sequence[torch.Tensor], momenta: Sequence[torch.Tensor], mu: float
) -> list[torch.Tensor]:
    """Update the momenta in place and return the Nesterov look-ahead of each.

    Args:
        gradients: float32 tensors.
        momenta: Of the same shapes; float32, or a narrower type in which they are only stored.
        mu: Decay of the moving average.

    Returns:
        float32 tensors of the same shapes.
    """
    grads = list(gradients)
    stored = list(momenta)
    working = [m if m.dtype == torch.float32 else m.float() for m in stored]
    torch._foreach_lerp_(working, grads, 1 - mu)
    narrow = [(m, w) for m, w in zip(stored, working, strict=True) if m is not w]
    if narrow:
        torch._foreach_copy_([m for m, _ in narrow], [w for _, w in narrow])
    return list(torch._foreach_lerp(grads, working, mu))


def normuon_update(
    look_ahead: torch.Tensor,
    second_momentum: torch.Tensor,
    *,
    beta2: float,
    eps: float,
    orthogonalize: Orthogonalize,
) -> torch.Tensor:
    """Turn a batch of look-ahead momenta into updates Δ; the row statistic is updated in place.

    Õ is a row scaling of O, so both Frobenius norms follow from r and v and no second pass over O is needed.

    Args:
        look_ahead: U, `[B, m, n]` float32.
        second_momentum: v, `[B, m, 1]` float32.
        beta2: Decay of v.
        eps: Added to v, and the floor of ‖Õ‖_F.
        orthogonalize: `[B, m, n] → [B, m, n]` float32.

    Returns:
        Δ, `[B, m, n]` float32.
    """
    m, n = look_ahead.shape[-2:]
    update = orthogonalize(look_ahead)
    row = torch.linalg.vector_norm(update, dim=-1, keepdim=True).square_()  # n · r
    second_momentum.lerp_(row / n, 1 - beta2)
    inverse = (second_momentum + eps).rsqrt_()
    norm = row.sum(dim=-2, keepdim=True).sqrt_()
    scaled_norm = (row * inverse.square()).sum(dim=-2, keepdim=True).sqrt_().clamp_min_(eps)
    return update.mul_(inverse * (norm / scaled_norm) * max(1.0, m / n) ** 0.5)
