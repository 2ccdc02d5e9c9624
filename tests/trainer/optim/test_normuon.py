"""The NorMuon step against golden numbers, a literal loop and NVIDIA's implementation."""

import pytest
import torch
from emerging_optimizers.orthogonalized_optimizers import AdaptiveMuon, muon_utils

from trainer.optim.normuon import nesterov_momentum, normuon_update
from trainer.optim.polar_express import COEFFICIENTS, polar_express

MU, BETA2, EPS = 0.95, 0.95, 1e-10


def step(gradient, momentum, second):
    """One batched step; momentum and row statistic are updated in place."""
    look_ahead = nesterov_momentum([gradient], [momentum], MU)[0]
    return normuon_update(look_ahead, second, beta2=BETA2, eps=EPS, orthogonalize=polar_express)


def literal_step(gradient, momentum, second):
    """The published formulas for one matrix, one line each."""
    momentum = MU * momentum + (1 - MU) * gradient
    look_ahead = (1 - MU) * gradient + MU * momentum
    orthogonal = polar_express(look_ahead)
    row = (orthogonal**2).mean(-1, keepdim=True)
    second = BETA2 * second + (1 - BETA2) * row
    scaled = orthogonal / torch.sqrt(second + EPS)
    scaled = scaled * orthogonal.norm() / max(scaled.norm().item(), EPS)
    m, n = gradient.shape
    return scaled * max(1.0, m / n) ** 0.5, momentum, second


def test_two_golden_steps():
    gradient = torch.tensor([[[1.0, 2.0, 3.0], [4.0, 5.0, 7.0]]])
    momentum, second = torch.zeros(1, 2, 3), torch.zeros(1, 2, 1)
    update = step(gradient, momentum, second)
    golden = torch.tensor([[[-0.761921, 0.295013, 0.745663], [0.772097, 0.515345, 0.601543]]])
    torch.testing.assert_close(update, golden, rtol=0, atol=1e-4)
    torch.testing.assert_close(second, torch.tensor([[[0.0201702], [0.0206155]]]), rtol=0, atol=1e-6)
    step(gradient, momentum, second)
    torch.testing.assert_close(second, torch.tensor([[[0.0393320], [0.0402006]]]), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("m", "n"), [(6, 10), (10, 6), (8, 8), (1, 5), (5, 1)])
def test_a_batch_equals_a_loop_of_the_literal_formulas(m, n):
    generator = torch.Generator().manual_seed(m * 100 + n)
    momentum, second = torch.zeros(5, m, n), torch.zeros(5, m, 1)
    expected = [(None, torch.zeros(m, n), torch.zeros(m, 1)) for _ in range(5)]
    for _ in range(3):
        gradients = torch.randn(5, m, n, generator=generator)
        update = step(gradients, momentum, second)
        expected = [literal_step(g, e[1], e[2]) for g, e in zip(gradients, expected, strict=True)]
        for found, index in ((update, 0), (momentum, 1), (second, 2)):
            literal = torch.stack([e[index] for e in expected])
            torch.testing.assert_close(found, literal, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize(("m", "n", "scale"), [(1536, 1024, 1.2247), (1024, 128, 2.8284), (128, 1024, 1.0)])
def test_the_update_keeps_the_norm_of_the_orthogonal_factor_times_the_shape_factor(m, n, scale):
    gradient = torch.randn(1, m // 32, n // 32)
    update = step(gradient, torch.zeros_like(gradient), torch.zeros(1, m // 32, 1))
    orthogonal = polar_express(gradient)
    assert update.norm() / orthogonal.norm() == pytest.approx(scale, rel=1e-3)


@pytest.mark.parametrize(("m", "n"), [(12, 7), (9, 9), (16, 4)])
def test_agrees_with_nvidia_for_tall_and_square_matrices(m, n, monkeypatch):
    """Configured alike: Nesterov, shape scaling, eps, float32, our coefficients with 1/1.02 in the first."""
    (a, b, c), *rest = COEFFICIENTS
    folded = ((a / 1.02, b / 1.02**3, c / 1.02**5), *rest)
    monkeypatch.setitem(muon_utils._COEFFICIENT_SETS, "polar_express", list(folded))
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(m, n, generator=generator)
    theirs = torch.nn.Parameter(weight.clone())
    optimizer = AdaptiveMuon(
        [theirs],
        lr=0.02,
        momentum=MU,
        weight_decay=0.1,
        nesterov=True,
        fp32_matmul_prec="highest",
        coefficient_type="polar_express",
        num_ns_steps=5,
        scale_mode="shape_scaling",
        moment2_method="normuon",
        beta2=BETA2,
        eps=EPS,
    )
    ours, momentum, second = weight.clone(), torch.zeros(1, m, n), torch.zeros(1, m, 1)
    for _ in range(4):
        gradient = torch.randn(m, n, generator=generator)
        theirs.grad = gradient.clone()
        optimizer.step()
        ours = ours * (1 - 0.02 * 0.1) - 0.02 * step(gradient[None], momentum, second)[0]
        torch.testing.assert_close(ours, theirs.detach(), rtol=0, atol=2e-6)


def test_no_gradient_history_gives_no_update_and_no_nan():
    momentum, second = torch.zeros(2, 3, 5), torch.zeros(2, 3, 1)
    for _ in range(2):
        update = step(torch.zeros(2, 3, 5), momentum, second)
        assert torch.equal(update, torch.zeros(2, 3, 5))
    assert torch.equal(second, torch.zeros(2, 3, 1))


def test_a_matrix_without_gradient_still_moves_by_its_momentum():
    """An expert that no token reached in this batch."""
    gradient = torch.randn(2, 4, 6)
    momentum, second = torch.zeros(2, 4, 6), torch.zeros(2, 4, 1)
    step(gradient, momentum, second)
    before = momentum.clone()
    update = step(torch.zeros(2, 4, 6), momentum, second)
    torch.testing.assert_close(momentum, MU * before)
    assert update.norm() > 1


def test_a_zero_matrix_in_a_batch_does_not_disturb_its_neighbours():
    gradient = torch.randn(3, 4, 6)
    gradient[1] = 0
    update = step(gradient, torch.zeros(3, 4, 6), torch.zeros(3, 4, 1))
    assert torch.equal(update[1], torch.zeros(4, 6))
    expected, _, _ = literal_step(gradient[2], torch.zeros(4, 6), torch.zeros(4, 1))
    torch.testing.assert_close(update[2], expected, rtol=1e-4, atol=1e-5)


def test_momentum_stored_in_bfloat16_only_rounds_what_is_stored():
    gradient = torch.randn(2, 4, 6)
    narrow, wide = torch.zeros(2, 4, 6, dtype=torch.bfloat16), torch.zeros(2, 4, 6)
    first = nesterov_momentum([gradient], [narrow], MU)[0]
    second = nesterov_momentum([gradient], [wide], MU)[0]
    assert torch.equal(first, second)
    assert torch.equal(narrow, wide.bfloat16())
    assert narrow.dtype == torch.bfloat16
