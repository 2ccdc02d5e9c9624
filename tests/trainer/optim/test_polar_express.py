import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import OptimizerError
from trainer.optim.polar_express import COEFFICIENTS, coefficients_for, polar_express

LOW, HIGH = 0.8589, 1.1411


def singular_values(matrices: torch.Tensor) -> torch.Tensor:
    return torch.linalg.svdvals(matrices.double())


@pytest.mark.parametrize(
    ("shape", "dtype", "low", "high"),
    [
        ((128, 1024), torch.float32, LOW - 1e-4, HIGH + 1e-4),
        ((1024, 128), torch.float32, LOW - 1e-4, HIGH + 1e-4),
        ((32, 1024), torch.float32, LOW - 1e-4, HIGH + 1e-4),
        ((1536, 1024), torch.float32, LOW - 1e-4, HIGH + 1e-4),
        ((128, 1024), torch.bfloat16, 0.83, 1.145),
        ((32, 1024), torch.bfloat16, 0.83, 1.145),
    ],
)
def test_gaussian_matrices_become_nearly_orthogonal(shape, dtype, low, high):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = singular_values(polar_express(matrices, dtype=dtype))
    assert values.min() >= low
    assert values.max() <= high


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the optimizer did not run on one")
@pytest.mark.parametrize("shape", [(128, 1024), (1536, 1024), (1024, 1024), (32, 1024)])
def test_on_cuda_products_are_bfloat16_and_agree_with_float32(shape):
    matrices = torch.randn(4, *shape, generator=torch.Generator().manual_seed(0))
    result = polar_express(matrices.cuda())
    assert result.dtype == torch.float32
    assert torch.equal(result, result.bfloat16().float())
    values = singular_values(result.cpu())
    assert values.max() <= 1.145
    if shape != (1024, 1024):  # a square Gaussian matrix has a few tiny singular values, which stay small
        assert values.min() >= 0.83
    exact = polar_express(matrices.cuda(), dtype=torch.float32).cpu()
    assert (result.cpu() - exact).norm() / exact.norm() < 0.03


@given(
    rows=st.integers(1, 24),
    columns=st.integers(1, 24),
    exponents=st.lists(st.floats(-2.9, 0), min_size=1, max_size=24),
    scale=st.floats(-3, 6),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=60, deadline=None)
def test_singular_values_end_in_the_interval_and_vectors_stay(rows, columns, exponents, scale, seed):
    """Against known float64 factors: values of at least 1e-3 of the norm end within [0.8589, 1.1411]."""
    generator = torch.Generator().manual_seed(seed)
    left, _ = torch.linalg.qr(torch.randn(rows, rows, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, columns, generator=generator, dtype=torch.float64))
    rank = min(rows, columns, len(exponents))
    spectrum = torch.tensor([10.0**e for e in exponents[:rank]], dtype=torch.float64)
    matrix = left[:, :rank] @ torch.diag(spectrum) @ right[:, :rank].T * 10.0**scale
    result = polar_express(matrix.float()).double()
    core = left[:, :rank].T @ result @ right[:, :rank]
    values = core.diagonal()
    large = spectrum / (spectrum.norm() * 1.02) >= 1e-3 * 1.05
    assert (values[large] >= LOW - 2e-3).all()
    assert (values <= HIGH + 2e-3).all()
    assert torch.linalg.matrix_norm(core - torch.diag(values)) < 2e-2  # the same singular vectors
    assert torch.linalg.matrix_norm(result - left[:, :rank] @ core @ right[:, :rank].T) < 2e-3


@pytest.mark.parametrize("shape", [(7, 4, 9), (7, 9, 4), (7, 5, 5), (2, 3, 4, 6)])
def test_a_batch_equals_its_matrices_one_by_one(shape):
    batch = torch.randn(shape)
    together = polar_express(batch)
    alone = torch.stack([polar_express(m) for m in batch.reshape(-1, *shape[-2:])]).view(shape)
    torch.testing.assert_close(together, alone, rtol=1e-5, atol=1e-6)


def test_transposing_commutes():
    matrices = torch.randn(3, 20, 8)
    torch.testing.assert_close(polar_express(matrices.mT), polar_express(matrices).mT)


def test_equals_the_polynomial_written_out():
    x = torch.randn(6, 10, dtype=torch.float64)
    result = polar_express(x.float())
    x = x / (x.norm() * 1.02 + 1e-6)
    for a, b, c in COEFFICIENTS:
        gram = x @ x.T
        x = a * x + b * gram @ x + c * gram @ gram @ x
    torch.testing.assert_close(result.double(), x, rtol=0, atol=2e-5)


@pytest.mark.parametrize("fill", [0.0, 1e-30])
def test_nothing_stays_nothing(fill):
    result = polar_express(torch.full((2, 3, 5), fill))
    assert torch.isfinite(result).all()
    assert result.abs().max() < 1e-18


def test_the_input_is_left_alone():
    matrices = torch.randn(2, 8, 4)
    before = matrices.clone()
    polar_express(matrices)
    assert torch.equal(matrices, before)


def test_another_safety_factor_needs_its_own_coefficients():
    assert coefficients_for(2e-2) == COEFFICIENTS
    assert coefficients_for(2e-2 + 5e-13) == COEFFICIENTS
    assert coefficients_for(1e-2, [(1.5, -0.5, 0.0)]) == ((1.5, -0.5, 0.0),)
    with pytest.raises(OptimizerError, match=r"0\.01.*0\.02.*polar_express_coefficients"):
        coefficients_for(1e-2)


@pytest.mark.parametrize("table", [[], [(1.0, 2.0)], [(1.0, float("nan"), 0.0)], [(1.0, 2.0, 3.0, 4.0)]])
def test_a_malformed_coefficient_table_is_refused(table):
    with pytest.raises(OptimizerError, match="polar_express_coefficients"):
        coefficients_for(2e-2, table)
