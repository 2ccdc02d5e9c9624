"""The kernel of small matrices, interpreted, against the batched path in float32."""

import os

import pytest
import torch

from tests.trainer.optim.optim_models import settings
from trainer.optim.low_halves import split
from trainer.optim.normuon import nesterov_momentum, normuon_update
from trainer.optim.parts import Part
from trainer.optim.polar_express import COEFFICIENTS, polar_express
from trainer.optim.routing import Route
from trainer.optim.small_matrices import SmallMatrices, Tiling, fits

ROUTE = Route("matrices", "normuon", False, 0.01, 0.1)
RATES, GATE = torch.tensor([[0.0] * 4, [0.01, 1 - 0.01 * 0.1, 0.0, 0.0]]), torch.tensor([0.5, 1.0])


def part_of(
    m: int, n: int, *, tensor_dim: int | None = None, route: Route = ROUTE, low_half: bool = False
) -> Part:
    """Three matrices: an ordinary one, a tiny one, and one of zeros."""
    generator = torch.Generator().manual_seed(m + n)
    sizes = torch.tensor([1.0, 1e-6, 0.0])[:, None, None]
    master = torch.randn(3, m, n, generator=generator) * 0.02
    state = {
        "momentum_buffer": torch.randn(3, m, n, generator=generator) * 0.1 * sizes,
        "second_momentum_buffer": torch.rand(3, m, 1, generator=generator) * 1e-2,
    }
    grad = torch.randn(3, m, n, generator=generator) * sizes
    weight, master = split(master) if low_half else (master, master)
    return Part(0, "experts", route, 0, weight, grad, master, state, tensor_dim, (m, n))


def small_of(*parts: Part) -> SmallMatrices:
    return SmallMatrices(parts, {ROUTE: 1}, settings(normuon_beta2=0.9), COEFFICIENTS, tiling=Tiling(wide=32))


@pytest.mark.parametrize(("m", "n"), [(16, 128), (128, 16), (32, 64)])
@pytest.mark.parametrize("low_half", [False, True])
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only")
def test_the_kernels_update_is_the_batched_paths(m, n, low_half):
    part = part_of(m, n, low_half=low_half)
    start, grad = part.read_master().clone(), part.grad.clone()
    momentum, second = (tensor.clone() for tensor in part.state.values())
    small_of(part).step(RATES, GATE)

    look_ahead = nesterov_momentum([grad * 0.5], [momentum], 0.95)[0]
    update = normuon_update(look_ahead, second, beta2=0.9, eps=1e-10, orthogonalize=polar_express)
    expected = start * (1 - 0.01 * 0.1) - 0.01 * update
    master = part.read_master()
    error = (master - expected).norm(dim=(1, 2)) / (0.01 * update).norm(dim=(1, 2)).clamp_min(1e-9)
    assert error.max() < 2e-5
    assert torch.equal(master[2], expected[2])
    torch.testing.assert_close(part.state["momentum_buffer"], momentum)
    torch.testing.assert_close(part.state["second_momentum_buffer"], second, rtol=1e-5, atol=1e-9)
    assert torch.equal(part.grad, grad)
    assert part.low_half is low_half
    if low_half:
        assert torch.equal(part.weight, split(master)[0])


@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only")
def test_matrices_of_several_layers_are_updated_as_each_alone_and_a_closed_gate_changes_none():
    alone, together = [part_of(16, 64), part_of(16, 64)], [part_of(16, 64), part_of(16, 64)]
    for part in (alone[1], together[1]):
        part.grad.mul_(-3)
    small_of(*together).step(RATES, torch.tensor([float("nan"), 0.0]))
    for part, untouched in zip(together, alone, strict=True):
        assert torch.equal(part.weight, untouched.weight)
        assert torch.equal(part.state["momentum_buffer"], untouched.state["momentum_buffer"])
        assert torch.equal(part.state["second_momentum_buffer"], untouched.state["second_momentum_buffer"])
    small_of(*together).step(RATES, GATE)
    for part in alone:
        small_of(part).step(RATES, GATE)
    assert torch.equal(together[0].weight, alone[0].weight)
    assert torch.equal(together[1].weight, alone[1].weight)
    assert not torch.equal(alone[0].weight, alone[1].weight)


@pytest.mark.parametrize(
    ("part", "expected"),
    [
        (part_of(16, 64), True),
        (part_of(64, 16), True),
        (part_of(16, 64, tensor_dim=0), False),
        (part_of(16, 80), False),
        (part_of(64, 64), False),
        (part_of(24, 64), False),
        (part_of(16, 64, route=Route("vectors", "adamw", False, 0.01, 0.0)), False),
    ],
)
def test_only_what_the_kernel_was_made_for_goes_to_it(part, expected):
    assert fits(part) is expected
