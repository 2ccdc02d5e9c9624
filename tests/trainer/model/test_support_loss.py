"""A loss of a few log-probabilities of each token against dense log-softmax: value, gradient, memory."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.model.test_chunked_cross_entropy import Watch
from trainer.errors import LossError
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.support_loss import chunked_support_loss

T, H, V, N = 29, 8, 53, 6


def problem(dtype=torch.float64, tokens=T, vocabulary=V, width=N, seed=0):
    """Operands, a support with absent and repeated ids, coefficients of a loss, and which tokens have one."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    support = torch.randint(-1, vocabulary, (tokens, width), generator=generator)
    support[::2, -1] = support[::2, 0]
    factors = torch.randn(tokens, width, generator=generator, dtype=torch.float64).to(
        torch.promote_types(dtype, torch.float32)
    )
    select = torch.rand(tokens, generator=generator) < 0.7
    return hidden, head, support, factors, select


def curved(factors, present):
    """A rule that is not linear in the log-probabilities and couples those of one token."""

    def rule(logprobs, rows):
        kept = torch.where(present[rows], logprobs, 0.0)
        rest = (1 - logprobs.exp().sum(dim=1)).clamp(min=1e-3)
        return (factors[rows] * kept).sum(dim=1) + kept.square().mean(dim=1) - rest.log()

    return rule


def oracle(hidden, head, support, rule, select):
    """The same through a dense log-softmax and autograd all the way."""
    logprobs = F.log_softmax(hidden @ head.T, dim=1)
    asked = logprobs.gather(1, support.clamp(min=0)).masked_fill(support < 0, -torch.inf)
    losses = torch.where(select, rule(asked, torch.arange(len(hidden))), 0.0)
    return losses.sum(), losses, logprobs


@pytest.mark.parametrize("chunk", [1, 5, None])
def test_value_and_gradients_equal_a_dense_log_softmax_for_any_chunk(chunk):
    hidden, head, support, factors, select = problem()
    rule = curved(factors, support >= 0)
    expected, expected_losses, logprobs = oracle(hidden, head, support, rule, select)
    wanted = torch.autograd.grad(3.0 * expected, (hidden, head))
    highest = torch.zeros(T, dtype=torch.float64)
    loss, losses = chunked_support_loss(
        hidden, head, support, rule, select=select, highest=highest, chunk_tokens=chunk
    )
    found = torch.autograd.grad(3.0 * loss, (hidden, head))
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(losses, expected_losses.detach())
    torch.testing.assert_close(highest[select], logprobs.amax(dim=1)[select].detach())
    assert not highest[~select].any()
    assert not losses.requires_grad
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs)


@settings(deadline=None, max_examples=25)
@given(seed=st.integers(0, 10**6), width=st.integers(1, 9), vocabulary=st.integers(1, 12))
def test_any_support_has_the_gradient_of_the_dense_form(seed, width, vocabulary):
    hidden, head, support, factors, select = problem(tokens=5, vocabulary=vocabulary, width=width, seed=seed)
    rule = curved(factors, support >= 0)
    expected = oracle(hidden, head, support, rule, select)[0]
    loss, _ = chunked_support_loss(hidden, head, support, rule, select=select, chunk_tokens=2)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-8)


def test_the_label_alone_is_cross_entropy():
    hidden, head, support, factors, select = problem(torch.float32)
    labels, weights = support[:, :1].clamp(min=0), factors[:, 0]
    loss, _ = chunked_support_loss(
        hidden, head, labels, lambda logprobs, rows: -weights[rows] * logprobs[:, 0], select=select
    )
    expected, _ = chunked_cross_entropy(hidden, head, labels[:, 0], weights, select=select)
    torch.testing.assert_close(loss, expected)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_bfloat16_is_close_to_float64_on_the_same_rounded_operands():
    hidden, head, support, factors, select = problem(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    rule = curved(factors.double(), support >= 0)
    expected = oracle(*exact, support, rule, select)[0]
    loss, losses = chunked_support_loss(
        hidden, head, support, curved(factors, support >= 0), select=select, chunk_tokens=4
    )
    assert (loss.dtype, losses.dtype) == (torch.float32, torch.float32)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(
        torch.autograd.grad(loss, (hidden, head)), torch.autograd.grad(expected, exact), strict=True
    ):
        error = (ours.double() - theirs).norm() / theirs.norm()
        assert error < 2**-7


def test_a_rule_that_stops_every_gradient_is_measured_and_trains_nothing():
    hidden, head, support, _, select = problem()
    loss, losses = chunked_support_loss(
        hidden, head, support, lambda logprobs, rows: logprobs[:, 0].exp().detach(), select=select
    )
    assert losses.any()
    for gradient in torch.autograd.grad(loss, (hidden, head)):
        assert not gradient.any()


def test_nothing_selected_gives_zero_loss_and_zero_gradients():
    hidden, head, support, factors, select = problem()
    rule = curved(factors, support >= 0)
    loss, losses = chunked_support_loss(hidden, head, support, rule, select=torch.zeros_like(select))
    loss.backward()
    assert loss.item() == 0.0
    assert not losses.any()
    assert not head.grad.any()
    assert not hidden.grad.any()


def test_no_tensor_of_all_logits_is_made_and_measuring_costs_one_product():
    tokens, vocabulary, chunk = 256, 4096, 16
    hidden, head, support, factors, _ = problem(torch.float32, tokens=tokens, vocabulary=vocabulary)
    rule, everything = curved(factors, support >= 0), torch.ones(tokens, dtype=torch.bool)
    with Watch() as training:
        chunked_support_loss(hidden, head, support, rule, select=everything, chunk_tokens=chunk)[0].backward()
    assert training.largest <= max(chunk * vocabulary, vocabulary * H)
    with torch.no_grad(), Watch() as measuring:
        loss, _ = chunked_support_loss(hidden, head, support, rule, select=everything)
    assert (measuring.calls.count("mm"), measuring.calls.count("addmm_")) == (1, 0)
    assert not loss.requires_grad


def test_what_cannot_be_computed_is_refused():
    hidden, head, support, factors, select = problem()
    rule = curved(factors, support >= 0)
    for bad in (-2, V):
        wrong = support.clone()
        wrong[select.nonzero()[0], 1] = bad
        with pytest.raises(LossError, match=rf"{bad}.*vocabulary has {V}"):
            chunked_support_loss(hidden, head, wrong, rule, select=select)
    with pytest.raises(LossError, match="support has shape"):
        chunked_support_loss(hidden, head, support[:-1], rule, select=select)
    with pytest.raises(LossError, match="select has shape"):
        chunked_support_loss(hidden, head, support, rule, select=select[:-1])
    with pytest.raises(LossError, match=r"the rule gave losses .* for"):
        chunked_support_loss(hidden, head, support, lambda logprobs, rows: logprobs, select=select)
