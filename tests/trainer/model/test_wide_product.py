"""A product into float32 and its gradients, from bfloat16 operands, against float64."""

import pytest
import torch

from trainer.model import wide_product
from trainer.model.router import linear_in
from trainer.model.wide_product import split, wide_linear


def operands():
    made = torch.Generator().manual_seed(0)
    hidden = torch.randn(3, 2, 24, generator=made).bfloat16()
    weight = torch.randn(8, 24, generator=made).bfloat16()
    bias = torch.randn(8, generator=made).bfloat16()
    return [tensor.requires_grad_() for tensor in (hidden, weight, bias)]


@pytest.fixture
def products_of_a_gpu(monkeypatch):
    """Stand in for `mm` of bfloat16 into float32, which a CPU lacks, by a product in float64."""

    def mm(left, right, *, out_dtype):
        return (left.double() @ right.double()).to(out_dtype)

    monkeypatch.setattr(wide_product.torch, "mm", mm)
    monkeypatch.setattr(wide_product, "_narrow", lambda *_: True)


def test_results_and_gradients_are_those_of_float64_but_for_the_last_rounding(products_of_a_gpu):
    found, exact = operands(), [tensor.detach().double().requires_grad_() for tensor in operands()]
    slope = torch.randn(3, 2, 8, generator=torch.Generator().manual_seed(1))
    out = wide_linear(*found, torch.float32)
    expected = linear_in(*exact, torch.float64)
    (out * slope).sum().backward()
    (expected * slope.double()).sum().backward()
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=1e-6)
    for seen, wanted in zip(found, exact, strict=True):
        assert seen.grad.dtype == torch.bfloat16
        torch.testing.assert_close(seen.grad.double(), wanted.grad, rtol=2**-7, atol=2**-9)


def test_on_a_cpu_it_is_the_plain_product():
    found = operands()
    assert torch.equal(wide_linear(*found, torch.float32), linear_in(*found, torch.float32))


def test_two_halves_add_up_to_the_number():
    wide = torch.randn(50, 4, generator=torch.Generator().manual_seed(2)) * torch.logspace(-8, 8, 4)
    upper, lower = split(wide).double().chunk(2, dim=1)
    assert ((upper + lower - wide).abs() <= wide.abs() * 2**-16).all()
