"""The stream's norms and sums in few passes, against torch's own operations."""

import pytest
import torch
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add

from trainer.model.residual import ResidualNorm, residual_sum


def as_it_is(function):
    """A backend's `fuse` that is not the reference's, without a compiler."""
    return function


def norm(dtype=torch.float64):
    made = ResidualNorm(None, 24, 1e-5, fuse=as_it_is).to(dtype)
    torch.nn.init.normal_(made.weight)
    return made


def test_outputs_and_gradients_of_a_norm_that_hands_on_the_stream_are_those_of_torch():
    ours, theirs = norm(torch.float32), torch.nn.RMSNorm(24, eps=1e-5)
    theirs.load_state_dict(ours.state_dict())
    theirs = theirs.double()
    x = torch.randn(5, 3, 24, requires_grad=True)
    wide = x.detach().double().requires_grad_()
    to_out, to_stream = torch.randn(2, 5, 3, 24)
    out, stream = ours(x)
    torch.autograd.backward((out, stream), (to_out, to_stream))
    expected = theirs(wide)
    torch.autograd.backward((expected, wide * 1), (to_out.double(), to_stream.double()))
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(x.grad.double(), wide.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours.weight.grad.double(), theirs.weight.grad, rtol=1e-4, atol=1e-5)
    assert torch.equal(stream, x)


def test_without_gradients_a_norm_is_torchs_and_gives_no_pair():
    ours, x = norm(), torch.randn(4, 24, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(ours(x), torch.nn.functional.rms_norm(x, (24,), ours.weight, 1e-5))
    assert isinstance(ours.eval()(x), torch.Tensor)


@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("training", [True, False])
def test_an_output_its_bias_and_the_stream_are_added_as_megatron_adds_them(training, biased):
    x, residual = torch.randn(2, 6, 8)
    bias = torch.randn(8) if biased else None
    found = residual_sum(as_it_is)(training, False)((x, bias), residual, 0.0)
    assert torch.equal(found, get_bias_dropout_add(training, False)((x, bias), residual, 0.0))
