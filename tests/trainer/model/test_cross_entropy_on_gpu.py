"""The bfloat16 path of a GPU: operands stay bfloat16, results are float32."""

import pytest
import torch

from trainer.model.cross_entropy import chunked_cross_entropy

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: the bfloat16 products did not run"
    ),
]


def test_bfloat16_on_a_gpu_is_close_to_float64_on_the_same_rounded_operands():
    tokens, width, vocabulary = 512, 256, 20_000
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    head = (torch.randn(vocabulary, width, generator=generator) * 0.1).bfloat16()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator) / tokens
    weights[::3] = 0.0

    exact = [tensor.double().requires_grad_() for tensor in (hidden, head)]
    expected, expected_ce = chunked_cross_entropy(*exact, labels, weights.double())
    expected.backward()

    device = [tensor.cuda().requires_grad_() for tensor in (hidden, head)]
    loss, ce = chunked_cross_entropy(*device, labels.cuda(), weights.cuda(), chunk_tokens=100)
    loss.backward()

    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss.double().cpu(), expected, rtol=1e-5, atol=0)
    # Far below bfloat16's 2**-9: the logits were not rounded to it.
    torch.testing.assert_close(ce.double().cpu(), expected_ce, rtol=1e-5, atol=1e-5)
    for found, wanted in zip(device, exact, strict=True):
        assert found.grad.dtype == torch.bfloat16
        error = (found.grad.double().cpu() - wanted.grad).norm() / wanted.grad.norm()
        assert error < 2**-7


def test_head_gradient_is_summed_over_chunks_in_float32():
    tokens = 2048
    hidden = torch.ones(tokens, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    head = torch.zeros(16, 8, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64, device="cuda")
    loss, _ = chunked_cross_entropy(hidden, head, labels, torch.ones(tokens, device="cuda"), chunk_tokens=1)
    loss.backward()
    expected = torch.full((16, 8), tokens / 16)
    expected[0] -= tokens
    torch.testing.assert_close(head.grad.float().cpu(), expected, rtol=2**-8, atol=0)


def test_peak_memory_is_that_of_a_chunk():
    tokens, width, vocabulary, chunk = 4096, 64, 50_000, 128
    hidden = torch.randn(tokens, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    head = torch.randn(vocabulary, width, dtype=torch.bfloat16, device="cuda", requires_grad=True)
    labels = torch.randint(vocabulary, (tokens,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss, _ = chunked_cross_entropy(
        hidden, head, labels, torch.ones(tokens, device="cuda"), chunk_tokens=chunk
    )
    loss.backward()
    peak = torch.cuda.max_memory_allocated() - before
    buffers = chunk * vocabulary * (4 + 2)
    gradients = vocabulary * width * (4 + 4 + 2)
    assert peak < 1.5 * (buffers + gradients) < tokens * vocabulary * 2 / 2
