from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.schema.experiment import load_experiment
from trainer.surgery.als import fit_tensor_product, tensor_product_error

HEADS, DIM, HIDDEN = 3, 4, 6


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def samples(tokens: int = 200, seed: int = 0, hidden: int = HIDDEN) -> torch.Tensor:
    """Normalised activations with a common direction, as those of a language model have."""
    z = torch.randn(tokens, hidden, generator=generator(seed)) + torch.linspace(-1, 1.5, hidden)
    return z / z.square().mean(-1, keepdim=True).sqrt()


def projection(heads: int = HEADS, seed: int = 1, hidden: int = HIDDEN) -> torch.Tensor:
    return torch.randn(heads, DIM, hidden, generator=generator(seed))


def composed(z: np.ndarray, a: np.ndarray, b: np.ndarray, heads: int, rank: int) -> np.ndarray:
    left = np.einsum("ti,hri->thr", z, a.reshape(heads, rank, -1))
    right = np.einsum("ti,rdi->trd", z, b.reshape(rank, DIM, -1))
    return np.einsum("thr,trd->thd", left, right) / rank


def naive_als(z: np.ndarray, w: np.ndarray, rank: int, sweeps: int) -> tuple[np.ndarray, list[float]]:
    """The same descent by least squares on explicit design matrices of (tokens × heads) rows."""
    tokens, hidden = z.shape
    heads, dim, _ = w.shape
    y = np.einsum("ti,hdi->thd", z, w)
    constant = np.linalg.lstsq(z, np.ones(tokens), rcond=None)[0]
    u, s, vh = np.linalg.svd(w.reshape(heads, -1), full_matrices=False)
    a = rank * np.einsum("hr,r,i->hri", u[:, :rank], s[:rank], constant)
    b = vh[:rank].reshape(rank, dim, hidden)
    errors = [float(((composed(z, a, b, heads, rank) - y) ** 2).sum() / (y**2).sum())]
    for _ in range(sweeps):
        left = np.einsum("ti,hri->thr", z, a) / rank
        design = np.einsum("thr,ti->thri", left, z).reshape(tokens * heads, rank * hidden)
        b = np.linalg.lstsq(design, y.reshape(tokens * heads, dim), rcond=None)[0]
        b = b.reshape(rank, hidden, dim).transpose(0, 2, 1)
        right = np.einsum("ti,rdi->trd", z, b) / rank
        design = np.einsum("trd,ti->tdri", right, z).reshape(tokens * dim, rank * hidden)
        a = np.linalg.lstsq(design, y.transpose(0, 2, 1).reshape(tokens * dim, heads), rcond=None)[0]
        a = a.reshape(rank, hidden, heads).transpose(2, 0, 1)
        errors.append(float(((composed(z, a, b, heads, rank) - y) ** 2).sum() / (y**2).sum()))
    return composed(z, a, b, heads, rank), errors


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_fit_equals_a_naive_float64_implementation(rank):
    z, w = samples(), projection()
    fit = fit_tensor_product([z], w, rank, sweeps=6, tolerance=0.0, generator=generator())
    expected, errors = naive_als(z.double().numpy(), w.double().numpy(), rank, sweeps=6)
    np.testing.assert_allclose(fit.errors, errors, rtol=1e-5)
    ours = composed(z.double().numpy(), fit.a.numpy(), fit.b.numpy(), HEADS, rank)
    np.testing.assert_allclose(ours, expected, atol=1e-3 * np.abs(expected).max())


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 1000),
    heads=st.integers(1, 4),
    rank=st.integers(1, 5),
    tokens=st.sampled_from([5, 40, 300]),
)
def test_error_never_rises_and_is_that_of_the_factors(seed, heads, rank, tokens):
    """Fewer tokens than unknowns and more ranks than heads included."""
    z, w = samples(tokens, seed), projection(heads, seed + 1)
    fit = fit_tensor_product([z], w, rank, sweeps=8, tolerance=0.0, generator=generator(seed))
    steps = np.diff(fit.errors)
    assert (steps <= 1e-9).all(), fit.errors
    assert tensor_product_error([z], w, fit.a, fit.b) == pytest.approx(fit.errors[-1], rel=1e-6, abs=1e-9)


@pytest.mark.parametrize(("heads", "rank"), [(2, 2), (4, 4), (2, 4)])
def test_projection_with_a_constant_input_is_recovered(heads, rank):
    """Where some feature of the input is constant, A can be constant and no head mixture is lost."""
    z = samples()
    z[:, 0] = 0.7
    fit = fit_tensor_product([z], projection(heads), rank, sweeps=10, generator=generator())
    assert fit.errors[-1] < 1e-12


def test_tensor_product_that_is_linear_on_the_inputs_is_recovered():
    """A projection made from factors: heads are mixtures of ``rank`` matrices, one feature is constant."""
    z = samples(hidden=8)
    z[:, 3] = -1.2
    mixture = torch.randn(5, 2, generator=generator(3))
    w = torch.einsum("hr,rdi->hdi", mixture, projection(2, hidden=8))
    fit = fit_tensor_product([z], w, 2, sweeps=10, generator=generator())
    assert fit.errors[-1] < 1e-12


def test_equal_heads_need_one_rank():
    w = projection(1).expand(3, -1, -1)
    z = samples()
    one = fit_tensor_product([z], w[:1], 1, sweeps=30, tolerance=0.0, generator=generator())
    three = fit_tensor_product([z], w, 1, sweeps=30, tolerance=0.0, generator=generator())
    assert three.errors[-1] == pytest.approx(one.errors[-1], rel=1e-6)


def test_further_ranks_beyond_the_heads_lower_the_error():
    z, w = samples(), projection(1)
    one = fit_tensor_product([z], w, 1, sweeps=20, generator=generator())
    four = fit_tensor_product([z], w, 4, sweeps=20, generator=generator())
    assert four.errors[-1] < 0.9 * one.errors[-1]


def test_chunks_of_the_inputs_do_not_change_the_fit():
    z, w = samples(), projection()
    whole = fit_tensor_product([z], w, 2, sweeps=4, generator=generator())
    parts = fit_tensor_product(list(z.split(37)), w, 2, sweeps=4, generator=generator())
    torch.testing.assert_close(parts.a, whole.a, rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(parts.b, whole.b, rtol=1e-6, atol=1e-8)


def test_fit_is_reproducible():
    first, second = (
        fit_tensor_product([samples()], projection(1), 3, sweeps=4, generator=generator(7)) for _ in range(2)
    )
    assert torch.equal(first.a, second.a)
    assert torch.equal(first.b, second.b)


def test_factors_have_equal_norms_and_orthogonal_ranks():
    rank = 3
    fit = fit_tensor_product([samples()], projection(), rank, sweeps=3, generator=generator())
    a = fit.a.view(HEADS, rank, HIDDEN).transpose(0, 1).flatten(1)
    b = fit.b.view(rank, DIM * HIDDEN)
    torch.testing.assert_close(a @ a.t(), b @ b.t(), rtol=1e-9, atol=1e-9)
    off_diagonal = (a @ a.t()).fill_diagonal_(0.0)
    assert off_diagonal.abs().max() < 1e-9


def test_sweeps_end_when_they_change_nothing():
    z = samples()
    z[:, 0] = 1.0
    seen = []
    fit_tensor_product(
        [z],
        projection(2),
        2,
        sweeps=50,
        generator=generator(),
        on_sweep=lambda n, error: seen.append((n, error)),
    )
    assert len(seen) < 5
    assert [number for number, _ in seen] == list(range(1, len(seen) + 1))


def test_the_recipes_tolerance_ends_a_slow_fit_close_to_where_it_would_end():
    """Ten sweeps, the bound that there was, stop this fit far above; the configs' bound is not reached."""
    experiment = load_experiment("full")
    settings = experiment.rungs["vpdense_28"].surgery
    assert settings == load_experiment("smoke").rungs["vpdense_28"].surgery.model_copy(
        update={"calibration_tokens": settings.calibration_tokens}
    )
    z, w = samples(600, seed=5, hidden=16), projection(6, seed=8, hidden=16)

    def fit(sweeps: int, tolerance: float) -> tuple[float, ...]:
        return fit_tensor_product([z], w, 3, sweeps=sweeps, tolerance=tolerance, generator=generator()).errors

    longest = fit(2000, 0.0)[-1]
    early = fit(10, 0.0)[-1]
    errors = fit(settings.als_sweeps, settings.als_tolerance)
    assert early > 1.005 * longest
    assert errors[-1] < 1.002 * longest
    assert 10 < len(errors) - 1 < settings.als_sweeps
    falls = [1 - after / before for before, after in pairwise(errors)]
    assert all(fall > settings.als_tolerance for fall in falls[:-1])
    assert falls[-1] <= settings.als_tolerance


@pytest.mark.parametrize(
    ("inputs", "weight", "rank", "message"),
    [
        ([], projection(), 2, "at least one"),
        ([torch.ones(3, HIDDEN + 1)], projection(), 2, r"expected at least one \[tokens, 6\]"),
        ([samples()], projection()[0], 2, r"\[heads, D, H\]"),
        ([samples()], projection(), 0, "rank = 0"),
        ([samples()], torch.zeros(HEADS, DIM, HIDDEN), 2, "nothing to fit"),
        ([samples().fill_(float("nan"))], projection(), 2, "not finite"),
    ],
)
def test_unusable_inputs_are_refused(inputs, weight, rank, message):
    with pytest.raises(ValueError, match=message):
        fit_tensor_product(inputs, weight, rank, sweeps=2, generator=generator())
