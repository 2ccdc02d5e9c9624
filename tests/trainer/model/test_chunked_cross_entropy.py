"""Chunked cross-entropy against torch's own, in value, gradient and memory."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from trainer.errors import LossError
from trainer.model import chunked_head
from trainer.model.cross_entropy import chunked_cross_entropy

T, H, V = 37, 8, 53


def problem(dtype=torch.float64, tokens=T, vocabulary=V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    head = torch.randn(vocabulary, H, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    labels = torch.randint(vocabulary, (tokens,), generator=generator)
    weights = torch.rand(tokens, generator=generator, dtype=torch.float64)
    weights[::3] = 0.0
    return hidden, head, labels, weights


def oracle(hidden, head, labels, weights):
    ce = F.cross_entropy(hidden @ head.T, labels, reduction="none")
    return (ce * weights).sum(), ce


@pytest.mark.parametrize("chunk", [1, 5, T, 10 * T, None])
def test_value_and_gradients_equal_torch_for_any_chunk(chunk):
    hidden, head, labels, weights = problem()
    expected, expected_ce = oracle(hidden, head, labels, weights)
    expected_grads = torch.autograd.grad(3.0 * expected, (hidden, head))

    loss, ce = chunked_cross_entropy(hidden, head, labels, weights, chunk_tokens=chunk)
    grads = torch.autograd.grad(3.0 * loss, (hidden, head))

    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(ce, torch.where(weights != 0, expected_ce, 0.0))
    for found, wanted in zip(grads, expected_grads, strict=True):
        torch.testing.assert_close(found, wanted)


def test_gradcheck():
    hidden, head, labels, weights = problem(tokens=7, vocabulary=11)
    torch.autograd.gradcheck(
        lambda h, w: chunked_cross_entropy(h, w, labels, weights, chunk_tokens=3)[0], (hidden, head)
    )


def test_logits_beyond_the_range_of_exp():
    hidden, head, labels, weights = problem(torch.float32)
    with torch.no_grad():
        hidden *= 300.0
    expected, _ = oracle(hidden.double(), head.double(), labels, weights)
    loss, _ = chunked_cross_entropy(hidden, head, labels, weights.float(), chunk_tokens=4)
    assert torch.isfinite(loss)
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=0)


def test_selected_tokens_of_weight_zero_are_measured_and_do_not_train():
    hidden, head, labels, weights = problem()
    everything = torch.ones(T, dtype=torch.bool)
    loss, ce = chunked_cross_entropy(hidden, head, labels, weights, select=everything, chunk_tokens=4)
    grad_hidden, grad_head = torch.autograd.grad(loss, (hidden, head))
    plain, _ = chunked_cross_entropy(hidden, head, labels, weights, chunk_tokens=4)
    expected = torch.autograd.grad(plain, (hidden, head))

    torch.testing.assert_close(ce, oracle(hidden, head, labels, weights)[1])
    torch.testing.assert_close(loss, plain)
    torch.testing.assert_close(grad_hidden, expected[0])
    torch.testing.assert_close(grad_head, expected[1])
    assert not grad_hidden[::3].any()


def test_per_token_losses_carry_no_gradient():
    hidden, head, labels, weights = problem()
    loss, ce = chunked_cross_entropy(hidden, head, labels, weights)
    assert loss.requires_grad
    assert not ce.requires_grad


def test_micro_batch_without_supervised_tokens_gives_zero_loss_and_zero_gradients():
    hidden, head, labels, weights = problem()
    loss, ce = chunked_cross_entropy(hidden, head, labels, torch.zeros_like(weights))
    loss.backward()
    assert loss.item() == 0.0
    assert not ce.any()
    # Zero rather than None: gradient hooks must fire for the head of such a micro-batch too.
    for grad in (head.grad, hidden.grad):
        assert grad is not None
        assert not grad.any()


def test_frozen_head_gets_no_gradient_and_hidden_still_does():
    hidden, head, labels, weights = problem()
    expected = torch.autograd.grad(oracle(hidden, head, labels, weights)[0], hidden)[0]
    loss, _ = chunked_cross_entropy(hidden, head.detach(), labels, weights)
    torch.testing.assert_close(torch.autograd.grad(loss, hidden)[0], expected)


def test_backward_twice_gives_the_same_gradient():
    hidden, head, labels, weights = problem()
    loss, _ = chunked_cross_entropy(hidden, head, labels, weights)
    first = torch.autograd.grad(2.0 * loss, (hidden, head), retain_graph=True)
    second = torch.autograd.grad(2.0 * loss, (hidden, head))
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b)


def test_bfloat16_sums_the_head_gradient_in_float32():
    """Many equal small contributions: a bfloat16 accumulator would stop growing after 256 of them."""
    tokens = 2048
    hidden = torch.ones(tokens, 4, dtype=torch.bfloat16, requires_grad=True)
    head = torch.zeros(16, 4, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.zeros(tokens, dtype=torch.int64)
    loss, ce = chunked_cross_entropy(hidden, head, labels, torch.ones(tokens), chunk_tokens=1)
    loss.backward()
    assert (loss.dtype, ce.dtype) == (torch.float32, torch.float32)
    assert (hidden.grad.dtype, head.grad.dtype) == (torch.bfloat16, torch.bfloat16)
    expected = torch.full((16, 4), tokens / 16)
    expected[0] -= tokens
    torch.testing.assert_close(head.grad.float(), expected, rtol=2**-8, atol=0)


def test_bfloat16_is_close_to_float64_on_the_same_rounded_operands():
    hidden, head, labels, weights = problem(torch.bfloat16)
    exact = [tensor.detach().double().requires_grad_() for tensor in (hidden, head)]
    expected, expected_ce = oracle(*exact, labels, weights)
    wanted = torch.autograd.grad(expected, exact)
    loss, ce = chunked_cross_entropy(hidden, head, labels, weights.float(), chunk_tokens=8)
    found = torch.autograd.grad(loss, (hidden, head))
    torch.testing.assert_close(loss.double(), expected, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(ce.double(), torch.where(weights != 0, expected_ce, 0.0), rtol=1e-5, atol=1e-5)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=2**-7, atol=1e-3)


class Watch(TorchDispatchMode):
    """The largest tensor that any operation returned, and the names of all operations."""

    def __init__(self):
        super().__init__()
        self.largest = 0
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.calls.append(function.overloadpacket.__name__)
        for leaf in tree_leaves(result):
            if isinstance(leaf, torch.Tensor):
                self.largest = max(self.largest, leaf.numel())
        return result


def test_no_tensor_of_all_logits_is_ever_made():
    tokens, vocabulary, chunk = 256, 4096, 16
    hidden, head, labels, weights = problem(torch.float32, tokens=tokens, vocabulary=vocabulary)
    with Watch() as chunked:
        loss, _ = chunked_cross_entropy(hidden, head, labels, weights.float(), chunk_tokens=chunk)
        loss.backward()
    with Watch() as plain:
        oracle(hidden, head, labels, weights.float())[0].backward()
    assert plain.largest >= tokens * vocabulary  # the watch sees what it is meant to see
    assert chunked.largest <= max(chunk * vocabulary, vocabulary * H)


def test_unsupervised_tokens_cost_nothing():
    """Half the tokens supervised: the head must multiply half the rows."""
    hidden, head, labels, weights = problem(torch.float32, tokens=64)
    weights = torch.zeros(64)
    weights[10:20] = 1.0
    rows = []

    class Rows(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.overloadpacket is torch.ops.aten.mm and args[1].shape == (H, V):
                rows.append(args[0].shape[0])
            return function(*args, **(kwargs or {}))

    with Rows():
        chunked_cross_entropy(hidden, head, labels, weights, chunk_tokens=4)
    assert rows == [4, 4, 2]


def test_no_gradient_work_when_evaluating():
    hidden, head, labels, weights = problem()
    expected, _ = oracle(hidden, head, labels, weights)
    with Watch() as training:
        chunked_cross_entropy(hidden, head, labels, weights)
    with torch.no_grad(), Watch() as watch:
        loss, _ = chunked_cross_entropy(hidden, head, labels, weights)
    assert (training.calls.count("mm"), training.calls.count("addmm_")) == (2, 1)
    assert (watch.calls.count("mm"), watch.calls.count("addmm_")) == (1, 0)
    assert not loss.requires_grad
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("tokens", [1, 2, 7, 8])
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_that_stay_in_the_cache_change_no_bit(monkeypatch, tokens, threads):
    vocabulary = 20_000  # enough that two rows are shared among threads
    hidden, head, labels, weights = problem(torch.float32, tokens, vocabulary)
    found = []
    own = torch.get_num_threads()
    for size in (1 << 40, 1):  # the chunk whole; as few rows as there may be
        monkeypatch.setattr(chunked_head, "_CACHED_BYTES", size)
        torch.set_num_threads(threads)
        try:
            loss, ce = chunked_cross_entropy(hidden, head, labels, weights, select=weights >= 0)
            found.append((loss, ce, *torch.autograd.grad(loss, (hidden, head))))
        finally:
            torch.set_num_threads(own)
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


@pytest.mark.parametrize("bad", [-1, V])
def test_label_outside_the_vocabulary_is_refused(bad):
    hidden, head, labels, weights = problem()
    labels[1] = bad
    with pytest.raises(LossError, match=rf"{bad}.*vocabulary has {V}"):
        chunked_cross_entropy(hidden, head, labels, weights)
    labels[0], labels[1] = bad, 0
    chunked_cross_entropy(hidden, head, labels, weights)  # weight 0: never looked at


def test_shapes_and_types_that_disagree_are_refused():
    hidden, head, labels, weights = problem()
    with pytest.raises(LossError, match="labels has shape"):
        chunked_cross_entropy(hidden, head, labels[:-1], weights)
    with pytest.raises(LossError, match="must be"):
        chunked_cross_entropy(hidden, head[:, :-1], labels, weights)
    with pytest.raises(LossError, match="must agree"):
        chunked_cross_entropy(hidden, head.float(), labels, weights)
