"""The support loss on a GPU: bfloat16 operands, float32 results, and the same bits whenever it is asked."""

import pytest
import torch

from trainer.model.support_loss import chunked_support_loss

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available(), reason="no CUDA device: nothing was added up in parallel"
    ),
]


def problem(tokens=512, width=256, vocabulary=20_000, kept=9):
    """Operands in bfloat16, and a support that is full of repeated ids."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, width, generator=generator).bfloat16()
    head = (torch.randn(vocabulary, width, generator=generator) * 0.1).bfloat16()
    support = torch.randint(-1, 40, (tokens, kept), generator=generator)
    factors = torch.randn(tokens, kept, generator=generator) / tokens
    return hidden, head, support, factors


def run(hidden, head, support, factors):
    operands = [tensor.clone().requires_grad_() for tensor in (hidden, head)]

    def rule(logprobs, rows):
        found = torch.where(support[rows] >= 0, logprobs, 0.0)
        return (factors[rows] * (found + found.exp())).sum(dim=1)

    select = torch.ones(len(hidden), dtype=torch.bool, device=hidden.device)
    loss, losses = chunked_support_loss(*operands, support, rule, select=select, chunk_tokens=100)
    loss.backward()
    return loss.detach(), losses, *(tensor.grad for tensor in operands)


def test_bfloat16_on_a_gpu_is_close_to_float64_on_the_same_rounded_operands():
    hidden, head, support, factors = problem()
    expected = run(hidden.double(), head.double(), support, factors.double())
    found = run(*(tensor.cuda() for tensor in (hidden, head, support, factors)))
    assert (found[0].dtype, found[2].dtype) == (torch.float32, torch.bfloat16)
    torch.testing.assert_close(found[1].double().cpu(), expected[1], rtol=1e-4, atol=1e-7)
    for ours, theirs in zip(found[2:], expected[2:], strict=True):
        assert (ours.double().cpu() - theirs).norm() / theirs.norm() < 2**-7


def test_repeated_ids_give_the_same_bits_every_time():
    operands = [tensor.cuda() for tensor in problem()]
    first = run(*operands)
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(run(*operands), first, strict=True))
