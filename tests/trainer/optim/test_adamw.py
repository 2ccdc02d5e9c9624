import pytest
import torch

from trainer.optim.adamw import adamw_


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_ten_steps_equal_torch(weight_decay):
    shapes = [(5, 4), (7,), ()]
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(shape, generator=generator) for shape in shapes]
    theirs = [torch.nn.Parameter(t.clone()) for t in start]
    oracle = torch.optim.AdamW(theirs, lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=weight_decay)
    ours = [t.clone() for t in start]
    first, second = [torch.zeros_like(t) for t in ours], [torch.zeros_like(t) for t in ours]
    for step in range(1, 11):
        gradients = [torch.randn(shape, generator=generator) for shape in shapes]
        for param, gradient in zip(theirs, gradients, strict=True):
            param.grad = gradient.clone()
        lr = 3e-3 / step
        oracle.param_groups[0]["lr"] = lr
        oracle.step()
        adamw_(
            ours,
            gradients,
            first,
            second,
            step=step,
            lr=lr,
            beta1=0.9,
            beta2=0.95,
            eps=1e-8,
            weight_decay=weight_decay,
        )
        for mine, other in zip(ours, theirs, strict=True):
            torch.testing.assert_close(mine, other.detach(), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(second[0], oracle.state[theirs[0]]["exp_avg_sq"])


def test_zero_gradient_gives_no_update_and_no_nan():
    weight = torch.randn(4)
    before = weight.clone()
    adamw_(
        [weight],
        [torch.zeros(4)],
        [torch.zeros(4)],
        [torch.zeros(4)],
        step=1,
        lr=1e-2,
        beta1=0.9,
        beta2=0.95,
        eps=1e-8,
        weight_decay=0.0,
    )
    assert torch.equal(weight, before)
