"""Parameters that rest at first: nothing of them changes, and they wake as if the run began there."""

import pytest
import torch

from tests.trainer.optim.optim_models import PrescribedGradients, settings, train, weights, whole
from trainer.errors import OptimizerError
from trainer.optim.freezing import train_only_layers
from trainer.optim.optimizer import Optimizer

RESTING = ("qkv", "weight1", "embedding", "norm", "omega")
STEPS = 3


def resting_model(dtype=torch.float32):
    model = PrescribedGradients(dtype=dtype)
    for name in RESTING:
        getattr(model, name).frozen_steps = STEPS
    return model


def states(optimizer):
    return {f"{p.name}.{kind}": t for p in optimizer._parts for kind, t in p.state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_rests_keeps_its_bits_and_gathers_no_state_until_its_step(dtype):
    model = resting_model(dtype)
    before = weights(model)
    optimizer = Optimizer(model, settings(), clip_grad=1.0)
    train(model, optimizer, range(STEPS))
    after = weights(model)
    assert {name for name in before if torch.equal(before[name], after[name])} == set(RESTING)
    for name, state in states(optimizer).items():
        assert bool(state.any()) != (name.split(".")[0] in RESTING), name
    train(model, optimizer, range(STEPS, STEPS + 1))
    awake = weights(model)
    assert not [name for name in RESTING if torch.equal(awake[name], before[name])]


def test_gradients_of_what_rests_are_neither_clipped_by_nor_counted():
    model = resting_model()
    stats = train(model, Optimizer(model, settings(), clip_grad=1.0), range(1))[0]
    counted = [whole(name, 100) for name, _ in model.named_parameters() if name not in RESTING]
    norm = sum(float(gradient.double().square().sum()) for gradient in counted) ** 0.5
    assert stats.grad_norm == pytest.approx(norm, rel=1e-6)


def test_adamw_corrects_its_bias_from_the_step_of_waking():
    model = resting_model()
    twin = torch.nn.Parameter(model.norm.detach().clone())
    oracle = torch.optim.AdamW([twin], lr=3e-3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.0)
    optimizer = Optimizer(model, settings(), clip_grad=0)
    for step in range(STEPS + 3):
        optimizer.zero_grad()
        model.backward(step)
        optimizer.step(1.0)
        if step >= STEPS:
            twin.grad = whole("norm", 100 + step)
            oracle.step()
    torch.testing.assert_close(model.norm.detach(), twin.detach())


def test_normuon_wakes_like_a_fresh_run():
    model, fresh = resting_model(), PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    other = Optimizer(fresh, settings(), clip_grad=0)
    for step in range(STEPS + 2):
        optimizer.zero_grad()
        model.backward(step)
        optimizer.step(1.0)
    for step in range(STEPS, STEPS + 2):
        other.zero_grad()
        fresh.backward(step)
        other.step(1.0)
    for name in ("qkv", "weight1"):
        assert torch.equal(getattr(model, name), getattr(fresh, name)), name


@pytest.mark.parametrize("name", ["norm", "weight1", "proj", "head"])
def test_the_second_warmup_scales_what_has_thawed_and_nothing_else(name):
    """`norm` and `weight1` (AdamW and NorMuon) have rested; `head` and `proj` have not."""
    moved = {}
    for factor in (1.0, 0.25):
        model = resting_model()
        optimizer = Optimizer(model, settings(weight_decay=0.0), clip_grad=0)
        train(model, optimizer, range(STEPS))
        before = weights(model)[name]
        optimizer.zero_grad()
        model.backward(STEPS)
        optimizer.step(1.0, factor)
        moved[factor] = weights(model)[name] - before
    share = 0.25 if name in RESTING else 1.0
    torch.testing.assert_close(moved[0.25], share * moved[1.0], rtol=1e-3, atol=1e-7)
    assert moved[1.0].abs().min() > 0


def test_closing_the_optimizer_leaves_nothing_frozen():
    model = resting_model()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    optimizer.zero_grad()
    assert not model.qkv.requires_grad
    optimizer.close()
    assert all(param.requires_grad for param in model.parameters())


def layered():
    model = torch.nn.Module()
    model.embedding = torch.nn.Linear(2, 2)
    model.decoder = torch.nn.Module()
    model.decoder.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(4))
    for number, layer in enumerate(model.decoder.layers, start=1):
        layer.layer_number = number
    return model


def test_everything_but_the_named_layers_is_marked():
    model = layered()
    train_only_layers(model, (2, 4), 5)
    marked = {name for name, param in model.named_parameters() if getattr(param, "frozen_steps", 0) == 5}
    assert marked == {
        f"{place}.{kind}"
        for place in ("embedding", "decoder.layers.0", "decoder.layers.2")
        for kind in ("weight", "bias")
    }
    untouched = layered()
    train_only_layers(untouched, (), 0)
    assert not any(hasattr(param, "frozen_steps") for param in untouched.parameters())


@pytest.mark.parametrize(("layers", "message"), [((2, 5), r"layers \[5\]"), ((), "without layers")])
def test_layers_that_are_not_there_are_refused(layers, message):
    with pytest.raises(OptimizerError, match=message):
        train_only_layers(layered(), layers, 5)
