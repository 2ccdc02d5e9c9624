"""The loss's kernel, in Triton's interpreter, against torch's cross-entropy in float64."""

import os

import pytest
import torch

from trainer.model import cross_entropy
from trainer.model.cross_entropy import chunked_cross_entropy, cross_entropy_of_rows

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only"
)


@pytest.mark.parametrize("scale", [1.0, 80.0])
@pytest.mark.parametrize("vocabulary", [5, 300])
def test_rows_and_gradients_are_those_of_torch_in_float64(scale, vocabulary, monkeypatch):
    monkeypatch.setattr(cross_entropy, "_KERNEL_COLUMNS", 128)
    made = torch.Generator().manual_seed(0)
    logits = torch.randn(7, vocabulary, generator=made) * scale
    labels = torch.randint(vocabulary, (7,), generator=made)
    weights = torch.rand(7, generator=made)
    weights[2] = 0.0
    exact = logits.double().requires_grad_()
    expected = torch.nn.functional.cross_entropy(exact, labels, reduction="none")
    (expected * weights.double()).sum().backward()
    before = logits.clone()
    found, grad = cross_entropy_of_rows(logits, labels, weights, torch.float32)
    torch.testing.assert_close(found.double(), expected.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad.double(), exact.grad, rtol=1e-4, atol=1e-6)
    assert torch.equal(logits, before)
    alone, none = cross_entropy_of_rows(logits, labels, weights, None)
    assert none is None
    assert torch.equal(alone, found)


def test_the_loss_and_its_gradients_are_the_same_with_the_kernel_and_without(monkeypatch):
    made = torch.Generator().manual_seed(1)
    hidden, head = torch.randn(13, 8, generator=made), torch.randn(40, 8, generator=made)
    labels = torch.randint(40, (13,), generator=made)
    weights = torch.rand(13, generator=made) * (torch.arange(13) % 3 > 0)
    found = []
    for kernel in (False, True):
        monkeypatch.setattr(cross_entropy, "uses_kernel", lambda *_, kernel=kernel: kernel)
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, head)]
        loss, ce = chunked_cross_entropy(*leaves, labels, weights, chunk_tokens=4)
        (loss * 2).backward()
        found.append([loss.detach(), ce, *(leaf.grad for leaf in leaves)])
    for expected, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-5, atol=1e-6)
