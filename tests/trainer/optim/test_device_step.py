"""The step by kernels, interpreted, against the step part by part: state, norms, refusals, resume."""

import os

import pytest
import torch

from tests.trainer.optim.optim_models import PrescribedGradients, settings, train, weights
from trainer.errors import NonFiniteGradientError, OptimizerError
from trainer.optim.low_halves import belongs
from trainer.optim.optimizer import Optimizer
from trainer.optim.sharded_state import state_tensors
from trainer.optim.tables import chunks

pytestmark = pytest.mark.skipif(
    "TRITON_INTERPRET" not in os.environ, reason="kernels are interpreted without a GPU only"
)


def made(*, kernels: bool, dtype: torch.dtype = torch.bfloat16, **changes):
    model = PrescribedGradients(dtype=dtype)
    changed = settings(weight_decay=0.1, embedding_weight_decay=0.01, **changes)
    return model, Optimizer(model, changed, clip_grad=1.0, kernels=kernels)


def state_of(optimizer: Optimizer) -> dict[str, torch.Tensor]:
    return {f"{p.name}.{kind}": t.clone() for p in optimizer._parts for kind, t in state_tensors(p)}


def assert_close(optimizer: Optimizer, expected: dict[str, torch.Tensor]) -> None:
    found = state_of(optimizer)
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-5, atol=1e-6, msg=name)


@pytest.mark.parametrize(
    ("name", "dtype"), [("normuon", torch.bfloat16), ("normuon", torch.float32), ("sgd", torch.bfloat16)]
)
def test_three_steps_are_those_of_the_other_path(name, dtype):
    (model, ours), (twin, other) = (
        made(kernels=True, name=name, dtype=dtype),
        made(kernels=False, name=name, dtype=dtype),
    )
    for step in range(3):
        found, wanted = (
            train(m, o, range(step, step + 1), scale=1.0 + step)[0] for m, o in ((model, ours), (twin, other))
        )
        assert found.grad_norm == pytest.approx(wanted.grad_norm, rel=1e-6)
        assert found.clip_scale == pytest.approx(wanted.clip_scale, rel=1e-6)
        assert found.learning_rates == wanted.learning_rates
    assert_close(ours, state_of(other))
    for part in ours._parts:
        assert part.low_half is (part.weight.dtype == torch.bfloat16)
        assert belongs(part.weight, part.read_master())
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, weights(twin)[name], rtol=1e-2, atol=1e-6)


def test_what_rested_first_wakes_with_averages_as_young_as_the_other_paths():
    pairs = [made(kernels=kernels) for kernels in (True, False)]
    for model, optimizer in pairs:
        optimizer.close()
        for name in ("norm", "weight1", "embedding"):
            getattr(model, name).frozen_steps = 2
    built = [
        Optimizer(model, settings(), clip_grad=0, kernels=kernels)
        for (model, _), kernels in zip(pairs, (True, False), strict=True)
    ]
    for (model, _), optimizer in zip(pairs, built, strict=True):
        before = weights(model)
        train(model, optimizer, range(2))
        assert torch.equal(model.norm, before["norm"])
        train(model, optimizer, range(2, 4))
    assert_close(built[0], state_of(built[1]))


def test_compiling_ahead_changes_neither_state_nor_the_step_that_follows():
    (model, ours), (twin, other) = made(kernels=True), made(kernels=True)
    train(model, ours, range(1))
    train(twin, other, range(1))
    before, held = state_of(ours), weights(model)
    ours.zero_grad()
    ours.compile()
    assert all(torch.equal(tensor, before[name]) for name, tensor in state_of(ours).items())
    assert all(torch.equal(tensor, held[name]) for name, tensor in weights(model).items())
    assert train(model, ours, range(1, 2)) == train(twin, other, range(1, 2))
    for name, tensor in state_of(ours).items():
        assert torch.equal(tensor, state_of(other)[name]), name


def test_compiling_ahead_meets_every_parameter_that_trains_now():
    model, optimizer = made(kernels=True)
    model.norm.requires_grad_(False)
    optimizer.compile()
    assert optimizer._active == [entry.param is not model.norm for entry in optimizer.routed]
    _, without = made(kernels=False)
    without.compile()
    assert without._active is None


@pytest.mark.parametrize("bad", ["gradient", "loss"])
def test_a_step_that_is_not_finite_changes_nothing_and_the_next_one_goes_on(bad):
    model, optimizer = made(kernels=True)
    train(model, optimizer, range(1))
    before, state = weights(model), state_of(optimizer)
    optimizer.zero_grad()
    model.backward(1)
    if bad == "gradient":
        model.weight1.main_grad[1, 2, 3] = float("inf")
    optimizer.launch(0.5, loss=torch.tensor(float("nan") if bad == "loss" else 1.0))
    with pytest.raises(NonFiniteGradientError, match=r"weight1" if bad == "gradient" else r"the loss is nan"):
        optimizer.finish()
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(optimizer).items())
    assert optimizer.steps == 1
    train(model, optimizer, range(1, 2))
    twin, other = made(kernels=True)
    train(twin, other, range(2))
    assert all(torch.equal(weight, weights(twin)[name]) for name, weight in weights(model).items())


def test_a_step_is_launched_and_finished_in_turn():
    model, optimizer = made(kernels=True)
    with pytest.raises(OptimizerError, match=r"call launch\(\) first"):
        optimizer.finish()
    optimizer.zero_grad()
    model.backward(0)
    optimizer.launch(1.0)
    with pytest.raises(OptimizerError, match=r"call finish\(\) first"):
        optimizer.launch(1.0)
    assert optimizer.finish().grad_norm > 0


@pytest.mark.parametrize("kernels", [True, False])
def test_state_goes_from_one_path_to_the_other_and_back(kernels):
    """A checkpoint has whole master weights, however they are kept."""
    model, optimizer = made(kernels=kernels)
    train(model, optimizer, range(2))
    saved = optimizer.sharded_state_dict(model.sharded_state_dict())
    loaded = saved | {"tensors": {name: entry.data.clone() for name, entry in saved["tensors"].items()}}
    assert loaded["tensors"]["weight1.master_weight"].dtype == torch.float32
    twin, other = made(kernels=not kernels)
    twin.load_state_dict(model.state_dict())
    other.load_state_dict(loaded)
    expected = state_of(optimizer)
    assert all(torch.equal(tensor, expected[name]) for name, tensor in state_of(other).items())
    train(model, optimizer, range(2, 4))
    train(twin, other, range(2, 4))
    assert_close(other, state_of(optimizer))


def test_weights_of_another_checkpoint_than_the_state_are_refused():
    model, optimizer = made(kernels=True)
    train(model, optimizer, range(1))
    saved = optimizer.sharded_state_dict(model.sharded_state_dict())
    loaded = saved | {"tensors": {name: entry.data.clone() for name, entry in saved["tensors"].items()}}
    _, other = made(kernels=True)
    with pytest.raises(OptimizerError, match="do not belong to the master weights"):
        other.load_state_dict(loaded)


def test_weights_changed_behind_the_kernels_are_refused_until_they_are_taken_over():
    model, optimizer = made(kernels=True)
    train(model, optimizer, range(1))
    with torch.no_grad():
        model.qkv.add_(1)
    with pytest.raises(OptimizerError, match=r"reload_master_weights"):
        train(model, optimizer, range(1, 2))
    optimizer.reload_master_weights()
    part = next(part for part in optimizer._parts if part.name == "qkv")
    assert torch.equal(part.read_master(), model.qkv.detach().float())


def test_chunks_cover_every_tensor_once():
    cut = chunks([5, 8, 1, 17], torch.device("cpu"), size=8)
    assert cut.tolist() == [[0, 0], [1, 0], [2, 0], [3, 0], [3, 1], [3, 2]]
