"""Tensor products fitted to a linear projection, by alternating least squares.

A tensor-product projection `q[h] = (1/R) Σ_r (A_{h,r} · z) (B_r z)` is quadratic in its input and has no
biases, so it can equal a given `q[h] = W_h z` on a set of inputs only. With either factor fixed the problem
is linear least squares in the other, and its normal equations are small: for A fixed, every output dimension
has the same matrix, made of `R (R + 1) / 2` weighted second moments `Σ_t w_t z_t z_tᵀ`; for B fixed,
every head has. A design matrix of (tokens × heads) rows and `R · H` columns is never formed.

Each half-step is a proximal one, `min error + λ ‖X − X_old‖²`: directions that the inputs do not determine
keep their values, the matrix is always definite, and the error cannot rise.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

_DAMPING = 1e-10
"""λ relative to the mean eigenvalue of the normal matrix: far below any direction that matters, far above the
rounding of the products in float64."""

_CHUNK_ELEMENTS = 1 << 18
"""Float64 numbers in the largest temporary of a chunk of tokens (2 MiB: a processor's cache) …"""

_CHUNK_TOKENS = 256
_CHUNK_TOKENS_PER_DIMENSION = 2
"""… but at least so many tokens, and so many times H: adding a product up must cost less than the product."""

_NEGLIGIBLE = 1e-7
"""Singular values below this share of the largest are those of a matrix of lower rank."""

Progress = Callable[[int, float], None]


@dataclass(frozen=True)
class TensorProduct:
    """Both factors of a tensor-product projection, in float64.

    Attributes:
        a: `[heads · rank, H]`, head-major.
        b: `[rank · D, H]`.
        errors: Relative mean square error at the start and after each sweep, never rising.
    """

    a: torch.Tensor
    b: torch.Tensor
    errors: tuple[float, ...]


def fit_tensor_product(
    inputs: Sequence[torch.Tensor],
    weight: torch.Tensor,
    rank: int,
    *,
    sweeps: int,
    tolerance: float = 5e-5,
    generator: torch.Generator,
    on_sweep: Progress | None = None,
) -> TensorProduct:
    """Fit `(1/R) Σ_r (A_{h,r} · z) (B_r z) ≈ W_h z` in the mean over the inputs.

    A descent can rest near a saddle for many sweeps, which no tolerance tells from its end; the fits of real
    projections seen so far did not.

    The start is `A ≈ constant`: the least-squares fit of 1 by a linear function of z, times the head
    mixtures of the `rank` leading singular directions of the matrix whose rows are the heads. A sweep
    solves for B, then for A. Sums are float64, on the device of the inputs.

    Args:
        inputs: Samples of z, a list of `[tokens, H]` in any floating type, all on one device.
        weight: `[heads, D, H]`, the projection to fit.
        rank: R.
        sweeps: Most sweeps to make.
        tolerance: Stop when a sweep lowers the error by less than this share of it.
        generator: CPU generator of the factors beyond the rank of the head matrix, which has no direction for
            them (more ranks than heads, or heads that are equal).
        on_sweep: Called after each sweep with its number from 1 and the error.

    Returns:
        The factors, balanced: `Σ A² = Σ B²` for each r, orthogonal across r.

    Raises:
        ValueError: Shapes do not fit, the projection is zero on all inputs, or a value is not finite.
    """
    _check(inputs, weight, rank, sweeps)
    weight = weight.to(inputs[0].device, torch.float64)
    heads, dim = weight.shape[:2]
    power = sum(float((z @ weight.flatten(0, 1).t()).square().sum()) for z in _chunks(inputs, heads * dim))
    if not power > 0:
        raise ValueError(
            "the projection is zero (or not finite) on all calibration inputs: there is nothing to fit; "
            "check the parent's weights and the calibration text"
        )
    a, b = _start(inputs, weight, rank, generator)
    errors: list[float] = []
    for sweep in range(1, sweeps + 1):
        b, before, _ = _half_step(inputs, a, b, weight, power)
        if sweep == 1:
            errors.append(before)
        a, _, after = _half_step(inputs, b, a, weight.transpose(0, 1), power)
        a, b = _balance(a, b)
        errors.append(after)
        if on_sweep is not None:
            on_sweep(sweep, after)
        if errors[-2] - errors[-1] <= tolerance * errors[-2]:
            break
    return TensorProduct(a.flatten(0, 1), b.transpose(0, 1).flatten(0, 1), tuple(errors))


def tensor_product_error(
    inputs: Sequence[torch.Tensor], weight: torch.Tensor, a: torch.Tensor, b: torch.Tensor
) -> float:
    """`Σ ‖tensor product(z) − W z‖² / Σ ‖W z‖²`, by running both: the error of factors as they are stored.

    Args:
        inputs: Samples of z, a list of `[tokens, H]`.
        weight: `[heads, D, H]`.
        a: `[heads · rank, H]`.
        b: `[rank · D, H]`.
    """
    heads, dim = weight.shape[:2]
    rank = a.shape[0] // heads
    device = inputs[0].device
    dense, left, right = (t.to(device, torch.float64) for t in (weight.flatten(0, 1), a, b))
    off = power = 0.0
    for z in _chunks(inputs, heads * dim):
        target = (z @ dense.t()).unflatten(-1, (heads, dim))
        product = (z @ left.t()).unflatten(-1, (heads, rank)) @ (z @ right.t()).unflatten(-1, (rank, dim))
        off += float((product / rank - target).square().sum())
        power += float(target.square().sum())
    return off / power


def _check(inputs: Sequence[torch.Tensor], weight: torch.Tensor, rank: int, sweeps: int) -> None:
    if weight.dim() != 3:
        raise ValueError(f"weight: expected [heads, D, H], found {list(weight.shape)}")
    hidden = weight.shape[-1]
    if not inputs or any(z.dim() != 2 or z.shape[1] != hidden for z in inputs):
        found = [list(z.shape) for z in inputs]
        raise ValueError(f"inputs: expected at least one [tokens, {hidden}], found {found}")
    if rank < 1 or sweeps < 1:
        raise ValueError(f"rank = {rank}, sweeps = {sweeps}: both must be at least 1")


def _chunks(inputs: Sequence[torch.Tensor], width: int) -> Iterator[torch.Tensor]:
    """Return the inputs in float64, in pieces whose rows of `width` numbers stay below the chunk size."""
    size = max(_CHUNK_TOKENS, _CHUNK_ELEMENTS // width, _CHUNK_TOKENS_PER_DIMENSION * inputs[0].shape[1])
    for z in inputs:
        for piece in z.split(size):
            yield piece.to(torch.float64)


def _start(
    inputs: Sequence[torch.Tensor], weight: torch.Tensor, rank: int, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `A` `[heads, R, H]` and `B` `[D, R, H]` of the best mixture of heads, A being near-constant."""
    heads, dim, hidden = weight.shape
    moment = weight.new_zeros(hidden, hidden)
    total = weight.new_zeros(hidden)
    for z in _chunks(inputs, hidden):
        moment += z.t() @ z
        total += z.sum(0)
    constant = _solve(moment, total[:, None])[:, 0]  # constant · z ≈ 1
    rows = weight.flatten(1)
    # heads × heads, so that the singular directions of a [heads, D · H] matrix cost nothing.
    values, left = torch.linalg.eigh(rows @ rows.t())
    values, left = values.flip(0)[:rank].clamp(min=0).sqrt(), left.flip(1)[:, :rank]
    left = left * _signs(left)
    kept = int((values > _NEGLIGIBLE * values[0]).sum())
    a, b = weight.new_zeros(heads, rank, hidden), weight.new_zeros(dim, rank, hidden)
    a[:, :kept] = rank * (left * values)[:, :kept, None] * constant
    right = left[:, :kept].t() @ rows / values[:kept, None]
    b[:, :kept] = right.unflatten(1, (dim, hidden)).transpose(0, 1)
    if kept < rank:  # B stays 0 there: the first half-step finds it
        noise = torch.randn(heads, rank - kept, hidden, generator=generator, dtype=torch.float64)
        a[:, kept:] = noise.to(a.device) * a[:, 0].square().mean().sqrt()
    return a, b


def _half_step(
    inputs: Sequence[torch.Tensor],
    fixed: torch.Tensor,
    moving: torch.Tensor,
    weight: torch.Tensor,
    power: float,
) -> tuple[torch.Tensor, float, float]:
    """Solve for one factor with the other fixed.

    The model is `y[n, m] = (1/R) Σ_r (F_{n,r} · z) (X_{m,r} · z)` for `y[n, m] = W_{n,m} · z`: n is the
    axis of the fixed factor, m that of the one to find (heads and dimensions, or the other way round).

    Args:
        inputs: Samples of z.
        fixed: F, `[n, R, H]`.
        moving: X as it is, `[m, R, H]`.
        weight: `[n, m, H]`.
        power: `Σ ‖y‖²`.

    Returns:
        The new X, and the relative mean square error before and after.
    """
    n, rank, hidden = fixed.shape
    m = moving.shape[0]
    rows, columns = torch.triu_indices(rank, rank, device=fixed.device)
    gram = fixed.new_zeros(hidden, len(rows) * hidden)
    product = fixed.new_zeros(hidden, rank * m)
    dense, factor = weight.flatten(0, 1), fixed.flatten(0, 1)
    for z in _chunks(inputs, max(len(rows) * hidden, n * m)):
        values = (z @ factor.t()).unflatten(1, (n, rank)).transpose(1, 2) / rank  # [t, R, n]
        weights = (values @ values.transpose(1, 2))[:, rows, columns]  # [t, pairs]
        gram.addmm_(z.t(), (weights[:, :, None] * z[:, None, :]).flatten(1))
        target = (z @ dense.t()).unflatten(1, (n, m))
        product.addmm_(z.t(), (values @ target).flatten(1))
    blocks = gram.unflatten(1, (len(rows), hidden)).transpose(0, 1)
    normal = fixed.new_empty(rank, hidden, rank, hidden)
    normal[rows, :, columns, :] = blocks
    normal[columns, :, rows, :] = blocks  # each block is itself symmetric
    normal = normal.flatten(2).flatten(0, 1)
    wanted = product.unflatten(1, (rank, m)).transpose(0, 1).flatten(0, 1)  # [R · H, m]
    old = moving.flatten(1).t()

    def error(x: torch.Tensor, image: torch.Tensor) -> float:
        return max(0.0, 1.0 + float((x * (image - 2.0 * wanted)).sum()) / power)

    image = normal @ old
    new = old + _solve(normal, wanted - image)
    before, after = error(old, image), error(new, normal @ new)
    return new.t().unflatten(1, (rank, hidden)), before, after


def _solve(matrix: torch.Tensor, wanted: torch.Tensor) -> torch.Tensor:
    """`(matrix + λ I)⁻¹ wanted` for a positive semidefinite matrix."""
    scale = float(matrix.diagonal().mean())
    damping = _DAMPING * scale
    eye = torch.eye(len(matrix), dtype=matrix.dtype, device=matrix.device)
    for _ in range(4):
        factor, info = torch.linalg.cholesky_ex(matrix + damping * eye)
        if int(info) == 0 and scale > 0:
            solution: torch.Tensor = torch.cholesky_solve(wanted, factor)
            return solution
        damping *= 100.0  # rounding of the sums, with inputs of a very wide range
    raise ValueError(
        "the calibration inputs give normal equations that cannot be solved: they hold values that are not "
        "finite, or are all zero; check the parent's weights and the calibration text"
    )


def _balance(a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the same product from factors of equal norm, orthogonal across r.

    Any invertible mixture of the ranks leaves the product alone. The one from the singular value
    decomposition of `Σ_r A_r ⊗ B_r` has the smallest norms, so nothing cancels between ranks when the
    factors are rounded.
    """
    left, left_triangle = torch.linalg.qr(a.transpose(1, 2).flatten(0, 1))
    right, right_triangle = torch.linalg.qr(b.transpose(1, 2).flatten(0, 1))
    u, s, vh = torch.linalg.svd(left_triangle @ right_triangle.t())
    sign, root = _signs(left @ u), s.sqrt()
    a = (left @ u * (sign * root)).unflatten(0, (a.shape[0], -1)).transpose(1, 2)
    b = (right @ vh.t() * (sign * root)).unflatten(0, (b.shape[0], -1)).transpose(1, 2)
    return a.contiguous(), b.contiguous()


def _signs(columns: torch.Tensor) -> torch.Tensor:
    """±1 for each column, positive where its largest element is: the choice that a decomposition leaves."""
    largest = columns.abs().argmax(dim=0)
    return torch.where(columns.gather(0, largest[None])[0] < 0, -1.0, 1.0).to(columns.dtype)
