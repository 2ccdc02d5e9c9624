"""The kernel of small matrices, interpreted, against the batched path in float32."""

import os

import pytest
import torch

from trainer.optim.normuon import nesterov_momentum, normuon_update
from trainer.optim.parts import Part
from trainer.optim.polar_express import COEFFICIENTS, SAFETY_FACTOR, polar_express
from trainer.optim.routing import Route
from trainer.optim.small_matrices import SmallMatrices, fits

ROUTE = Route("matrices", "normuon", False, 0.01, 0.1)


def part_of(m: int, n: int, *, tensor_dim: int | None = None, route: Route = ROUTE) -> Part:
    """Three matrices: an ordinary one, a tiny one, and one of zeros."""
    generator = torch.Generator().manual_seed(m + n)
    sizes = torch.tensor([1.0, 1e-6, 0.0])[:, None, None]
    master = torch.randn(3, m, n, generator=generator) * 0.02
    state = {
        "momentum_buffer": torch.randn(3, m, n, generator=generator) * 0.1 * sizes,
        "second_momentum_buffer": torch.rand(3, m, 1, generator=generator) * 1e-2,
    }
    grad = torch.randn(3, m, n, generator=generator) * sizes
    return Part(0, "experts", route, 0, master.clone(), grad, master, state, tensor_dim, (m, n))


@pytest.mark.parametrize(("m", "n"), [(16, 128), (128, 16), (32, 64)])
@pytest.mark.parametrize("programs", [1, 2])
@pytest.mark.skipif("TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only")
def test_the_kernels_update_is_the_batched_paths(m, n, programs):
    part = part_of(m, n)
    start, grad = part.master.clone(), part.grad.clone()
    momentum, second = (tensor.clone() for tensor in part.state.values())
    small = SmallMatrices([part], COEFFICIENTS, SAFETY_FACTOR)
    small._programs = programs
    small.step(rate=lambda route: route.lr, clip_scale=0.5, mu=0.95, beta2=0.9, eps=1e-10)

    look_ahead = nesterov_momentum([grad * 0.5], [momentum], 0.95)[0]
    update = normuon_update(look_ahead, second, beta2=0.9, eps=1e-10, orthogonalize=polar_express)
    expected = start * (1 - 0.01 * 0.1) - 0.01 * update
    error = (part.master - expected).norm(dim=(1, 2)) / (0.01 * update).norm(dim=(1, 2)).clamp_min(1e-9)
    assert error.max() < 2e-5
    assert torch.equal(part.master[2], expected[2])
    torch.testing.assert_close(part.state["momentum_buffer"], momentum)
    torch.testing.assert_close(part.state["second_momentum_buffer"], second, rtol=1e-5, atol=1e-9)
    assert torch.equal(part.grad, grad)
    assert torch.equal(part.weight, part.master)


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
