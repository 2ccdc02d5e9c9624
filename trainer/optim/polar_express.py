"""Polar Express: the orthogonal factor of many matrices at once, with matrix products only.

The polar factor of `U = P Σ Qᵀ` is `P Qᵀ`: the same singular vectors with every singular value set to
one. Polar Express (Amsel, Persson, Musco, Gower, 2025) applies an odd quintic `a x + b x³ + c x⁵` to the
singular values a few times, each time with the coefficients that are minimax optimal for the interval reached
so far.
"""

import math
from collections.abc import Sequence

import torch

from trainer.errors import OptimizerError

Coefficients = tuple[tuple[float, float, float], ...]

#: Computed for five iterations, a safety factor of 2e-2 and a cushion of 2.
COEFFICIENTS: Coefficients = (
    (8.156554524902461, -22.48329292557795, 15.878769915207462),
    (4.042929935166739, -2.808917465908714, 0.5000178451051316),
    (3.8916678022926607, -2.772484153217685, 0.5060648178503393),
    (3.285753657755655, -2.3681294933425376, 0.46449024233003106),
    (2.3465413258596377, -1.7097828382687081, 0.42323551169305323),
)
SAFETY_FACTOR = 2e-2
NORM_EPSILON = 1e-6


def coefficients_for(
    safety_factor: float, table: Sequence[tuple[float, float, float]] | None = None
) -> Coefficients:
    """Choose the coefficient table that belongs to a safety factor.

    Args:
        safety_factor: Relative margin by which the input is shrunk below unit Frobenius norm.
        table: One `(a, b, c)` for each iteration, computed for `safety_factor`; None for the built-in
            one.

    Returns:
        One triple for each iteration.

    Raises:
        OptimizerError: The built-in table does not belong to `safety_factor` and no other is given, or the
            given one is not a non-empty list of triples of finite numbers.
    """
    if table is None:
        if abs(safety_factor - SAFETY_FACTOR) > 1e-12:
            raise OptimizerError(
                f"polar_express_safety_factor = {safety_factor!r}: the built-in coefficients were computed "
                "for "
                f"{SAFETY_FACTOR!r}. Use that value, or give polar_express_coefficients computed for "
                f"{safety_factor!r}."
            )
        return COEFFICIENTS
    if not table:
        raise OptimizerError("polar_express_coefficients is empty: give one [a, b, c] for each iteration.")
    for index, row in enumerate(table):
        if len(row) != 3 or not all(math.isfinite(value) for value in row):
            raise OptimizerError(
                f"polar_express_coefficients: row {index} must be three finite numbers, found {row!r:.80}."
            )
    return tuple((float(a), float(b), float(c)) for a, b, c in table)


def polar_express(
    matrices: torch.Tensor,
    *,
    coefficients: Sequence[tuple[float, float, float]] = COEFFICIENTS,
    safety_factor: float = SAFETY_FACTOR,
    dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """Approximate the polar factor of every matrix of a batch.

    With the built-in table a singular value that is at least 1e-3 of the (shrunk) Frobenius norm ends within
    [0.8589, 1.1411] in exact arithmetic; smaller ones stay smaller. A zero matrix gives zero.

    Args:
        matrices: `[..., m, n]` floating point.
        coefficients: One `(a, b, c)` for each iteration.
        safety_factor: The margin the coefficients were computed for.
        dtype: Of the products; by default bfloat16 on CUDA and float32 elsewhere.

    Returns:
        `[..., m, n]` float32.
    """
    if dtype is None:
        dtype = torch.bfloat16 if matrices.is_cuda else torch.float32
    tall = matrices.size(-2) > matrices.size(-1)
    # The norm and the division stay in float32: rounding them to bfloat16 first could leave the interval for
    # which the coefficients hold.
    scale = torch.linalg.vector_norm(matrices, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x = (matrices / (scale * (1 + safety_factor) + NORM_EPSILON)).to(dtype)
    batch = x.shape[:-2]
    x = x.reshape(-1, *x.shape[-2:])
    if tall:  # the Gram matrix is then formed on the short side
        x = x.mT.contiguous()
    for a, b, c in coefficients:
        gram = torch.bmm(x, x.mT)
        polynomial = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, polynomial, x, beta=a)
    if tall:
        x = x.mT
    return x.to(torch.float32).reshape(*batch, *x.shape[-2:])
