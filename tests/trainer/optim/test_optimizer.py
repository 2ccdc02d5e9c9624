"""The optimizer on one process: one step written out by hand, clipping, masters, freezing, refusals."""

import math

import pytest
import torch

from tests.trainer.optim.optim_models import (
    SPECS,
    PrescribedGradients,
    settings,
    state_bytes,
    train,
    weights,
    whole,
)
from trainer.errors import (
    MissingGradientError,
    NonFiniteGradientError,
    OptimizerError,
    OptimizerStateError,
)
from trainer.model.parameters import mark_written
from trainer.optim.elementwise import plan_elementwise
from trainer.optim.matrices import plan_matrices
from trainer.optim.optimizer import Optimizer
from trainer.optim.polar_express import polar_express

MATRICES = ("qkv", "proj", "tpa", "tpa_other_layer", "router", "weight1", "weight2")


def reference_step(weight, gradient, state, step, lr, *, matrix, weight_decay):
    """One step of one tensor in plain formulas; stacks are looped over."""
    if matrix and weight.ndim == 3:
        states = state.setdefault("each", [{} for _ in weight])
        pairs = zip(weight, gradient, states, strict=True)
        return torch.stack(
            [reference_step(w, g, s, step, lr, matrix=True, weight_decay=weight_decay) for w, g, s in pairs]
        )
    if matrix:
        m, n = weight.shape
        state["m"] = 0.95 * state.get("m", 0) + 0.05 * gradient
        orthogonal = polar_express(0.05 * gradient + 0.95 * state["m"])
        state["v"] = 0.95 * state.get("v", 0) + 0.05 * (orthogonal**2).mean(-1, keepdim=True)
        update = orthogonal / torch.sqrt(state["v"] + 1e-10)
        update = update * orthogonal.norm() / update.norm() * max(1.0, m / n) ** 0.5
    else:
        state["m"] = 0.9 * state.get("m", 0) + 0.1 * gradient
        state["v"] = 0.95 * state.get("v", 0) + 0.05 * gradient**2
        update = (state["m"] / (1 - 0.9**step)) / (torch.sqrt(state["v"] / (1 - 0.95**step)) + 1e-8)
    return weight * (1 - lr * weight_decay) - lr * update


def test_three_steps_equal_the_formulas_written_out_parameter_by_parameter():
    model = PrescribedGradients()
    expected = weights(model)
    optimizer = Optimizer(model, settings(), clip_grad=1.0)
    states = {name: {} for name in SPECS}
    for step in (1, 2, 3):
        stats = train(model, optimizer, range(step - 1, step))[0]
        gradients = {name: whole(name, 100 + step - 1) for name in SPECS}
        norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
        assert stats.grad_norm == pytest.approx(norm, rel=1e-6)
        assert stats.clip_scale == pytest.approx(1 / norm, rel=1e-5)
        for name in SPECS:
            matrix = name in MATRICES
            peak = 2e-2 if matrix else 3e-2 if name in ("embedding", "head") else 3e-3
            expected[name] = reference_step(
                expected[name],
                gradients[name] / norm,
                states[name],
                step,
                peak / step,
                matrix=matrix,
                weight_decay=0.1 if matrix else 0.0,
            )
            torch.testing.assert_close(getattr(model, name).detach(), expected[name], rtol=1e-4, atol=1e-5)
    assert stats.learning_rates == pytest.approx({"matrices": 2e-2 / 3, "vectors": 1e-3, "embeddings": 1e-2})
    assert optimizer.steps == 3


@pytest.mark.parametrize("chunk", [1, 3 * 48, 1 << 26])
def test_the_size_of_a_batch_does_not_matter(chunk, monkeypatch):
    reference = PrescribedGradients()
    train(reference, Optimizer(reference, settings(), clip_grad=0), range(2))
    monkeypatch.setitem(plan_matrices.__kwdefaults__, "chunk_elements", chunk)
    monkeypatch.setitem(plan_elementwise.__kwdefaults__, "chunk_elements", chunk)
    model = PrescribedGradients()
    train(model, Optimizer(model, settings(), clip_grad=0), range(2))
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight, weights(reference)[name], rtol=1e-5, atol=1e-6)


def test_without_clipping_gradients_keep_their_size():
    model = PrescribedGradients()
    stats = train(model, Optimizer(model, settings(), clip_grad=0), range(1))[0]
    assert stats.clip_scale == 1.0
    assert stats.grad_norm > 10


def test_a_gradient_below_the_limit_is_not_clipped():
    model = PrescribedGradients()
    stats = train(model, Optimizer(model, settings(), clip_grad=1e4), range(1))[0]
    assert stats.clip_scale == 1.0


def test_bfloat16_weights_follow_float32_masters():
    """Steps far below bfloat16's spacing add up in the master weight and reach the model in the end."""
    model = PrescribedGradients(dtype=torch.bfloat16)
    model.norm.data.fill_(1.0)
    for name, param in model.named_parameters():
        param.requires_grad_(name == "norm")
    optimizer = Optimizer(model, settings(normuon_aux_lr=1e-4), clip_grad=0)
    for step in range(30):
        optimizer.zero_grad()
        model.norm.sum().backward()
        optimizer.step(1.0)
        if step == 0:
            assert torch.equal(model.norm.detach(), torch.ones(8, dtype=torch.bfloat16))
    expected = torch.full((8,), 1.0 - 30 * 1e-4).bfloat16()
    assert torch.equal(model.norm.detach(), expected)
    assert model.omega.dtype == torch.float32


def test_a_bfloat16_model_trains_close_to_its_float32_twin():
    wide, narrow = PrescribedGradients(), PrescribedGradients(dtype=torch.bfloat16)
    train(wide, Optimizer(wide, settings(), clip_grad=1.0), range(4))
    train(narrow, Optimizer(narrow, settings(), clip_grad=1.0), range(4))
    for name, weight in weights(wide).items():
        torch.testing.assert_close(weights(narrow)[name].float(), weight, rtol=2e-2, atol=2e-3)


def test_state_takes_what_the_memory_plan_says():
    model = PrescribedGradients(dtype=torch.bfloat16)
    matrices = sum(getattr(model, name).numel() for name in MATRICES)
    rows = sum(getattr(model, name).numel() // getattr(model, name).size(-1) for name in MATRICES)
    others = sum(p.numel() for p in model.parameters()) - matrices
    masters = sum(p.numel() for p in model.parameters()) - 1 - 12  # omega and log_freq are their own
    bytes_needed = 4 * (masters + matrices + rows + 2 * others)
    assert state_bytes(Optimizer(model, settings(), clip_grad=0)) == bytes_needed
    narrow = Optimizer(
        PrescribedGradients(dtype=torch.bfloat16), settings(momentum_dtype="bf16"), clip_grad=0
    )
    assert state_bytes(narrow) == bytes_needed - 2 * matrices


def test_momentum_in_bfloat16_trains_close_to_float32():
    wide, narrow = PrescribedGradients(), PrescribedGradients()
    train(wide, Optimizer(wide, settings(), clip_grad=1.0), range(4))
    train(narrow, Optimizer(narrow, settings(momentum_dtype="bf16"), clip_grad=1.0), range(4))
    assert not torch.equal(wide.qkv, narrow.qkv)
    torch.testing.assert_close(wide.qkv, narrow.qkv, rtol=0, atol=1e-3)


def test_zero_gradients_change_only_what_decays():
    model = PrescribedGradients()
    before = weights(model)
    stats = train(model, Optimizer(model, settings(), clip_grad=1.0), range(1), scale=0.0)[0]
    assert stats.grad_norm == 0.0
    for name, weight in weights(model).items():
        shrunk = before[name] * (1 - 2e-2 * 0.1) if name in MATRICES else before[name]
        torch.testing.assert_close(weight, shrunk, rtol=1e-6, atol=0)


def test_a_parameter_without_gradient_stops_the_step_before_anything_changes():
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=1.0)
    train(model, optimizer, range(1))
    before, state = weights(model), {k: v.clone() for k, v in state_of(optimizer).items()}
    with pytest.raises(MissingGradientError, match="qkv, norm: 2 of"):
        train(model, optimizer, range(1, 2), skip=("qkv", "norm"))
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(optimizer).items())
    assert optimizer.steps == 1
    train(model, optimizer, range(1, 2))  # and it goes on with the next batch


def test_a_step_of_gradients_written_past_autograd_is_never_a_silent_success():
    """As a replayed graph writes them: every main gradient, and no hook runs."""
    model, twin = PrescribedGradients(), PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=1.0)

    def replay():
        optimizer.zero_grad()
        for name, param in model.named_parameters():
            param.main_grad.add_(whole(name, 100))

    replay()
    with pytest.raises(MissingGradientError, match=f"embedding, qkv, qkv_bias and {len(SPECS) - 3} more"):
        optimizer.step(1.0)
    assert all(torch.equal(weight, weights(twin)[name]) for name, weight in weights(model).items())
    replay()
    mark_written(*model.parameters())
    stats = optimizer.step(1.0)
    assert stats == train(twin, Optimizer(twin, settings(), clip_grad=1.0), range(1))[0]
    assert stats.grad_norm > 10
    assert all(torch.equal(weight, weights(twin)[name]) for name, weight in weights(model).items())


def test_updates_are_planned_once_and_again_when_parameters_thaw(monkeypatch):
    planned = []
    monkeypatch.setattr(
        "trainer.optim.optimizer.plan_elementwise",
        lambda parts: planned.append([part.name for part in parts]) or plan_elementwise(parts),
    )
    model = PrescribedGradients()
    model.norm.frozen_steps = 2
    optimizer = Optimizer(model, settings(), clip_grad=0)
    train(model, optimizer, range(5))
    assert len(planned) == 2
    assert set(planned[1]) - set(planned[0]) == {"norm"}


def test_lists_of_element_wise_parts_are_bounded_and_keep_routes_apart():
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    parts = [part for part in optimizer._parts if part.route.algorithm != "normuon"]
    for bound in (1, 20, 500, 1 << 20):
        chunks = plan_elementwise(parts, chunk_elements=bound)
        assert sorted(part.name for chunk in chunks for part in chunk) == sorted(p.name for p in parts)
        for chunk in chunks:
            assert len({part.route for part in chunk}) == 1
            assert len(chunk) == 1 or sum(part.master.numel() for part in chunk) <= bound
    assert len(chunks) == len({part.route for part in parts})


def test_sgd_follows_the_gradient():
    model = PrescribedGradients()
    before = weights(model)
    train(model, Optimizer(model, settings(name="sgd"), clip_grad=0), range(1))
    torch.testing.assert_close(model.qkv.detach(), before["qkv"] * (1 - 2e-3) - 2e-2 * whole("qkv", 100))
    torch.testing.assert_close(model.norm.detach(), before["norm"] - 3e-3 * whole("norm", 100))


def test_adam_equals_torch_on_matrices_too():
    model = PrescribedGradients()
    twin = torch.nn.Parameter(model.qkv.detach().clone())
    oracle = torch.optim.AdamW([twin], lr=2e-2, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1)
    optimizer = Optimizer(model, settings(name="adam"), clip_grad=0)
    for step in range(3):
        optimizer.zero_grad()
        model.backward(step)
        optimizer.step(1.0)
        twin.grad = whole("qkv", 100 + step)
        oracle.step()
    torch.testing.assert_close(model.qkv.detach(), twin.detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_gradient_stops_before_anything_changes(bad):
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=1.0)
    train(model, optimizer, range(1))
    before, state = weights(model), {k: v.clone() for k, v in state_of(optimizer).items()}
    optimizer.zero_grad()
    model.backward(1)
    model.proj.main_grad[0, 3] = bad
    with pytest.raises(NonFiniteGradientError, match=r"optimizer step 2.*proj"):
        optimizer.step(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    assert all(torch.equal(tensor, state[name]) for name, tensor in state_of(optimizer).items())
    assert optimizer.steps == 1
    train(model, optimizer, range(1, 2))  # and it goes on with the next batch


def state_of(optimizer):
    return {f"{p.name}.{kind}": t for p in optimizer._parts for kind, t in p.state.items()}


def test_weights_loaded_behind_the_masters_are_noticed():
    model = PrescribedGradients(dtype=torch.bfloat16)
    optimizer = Optimizer(model, settings(), clip_grad=0)
    train(model, optimizer, range(1))
    model.load_state_dict(PrescribedGradients(dtype=torch.bfloat16, seed=7).state_dict())
    optimizer.zero_grad()
    model.backward(1)
    with pytest.raises(OptimizerError, match="reload_master_weights"):
        optimizer.step(1.0)
    optimizer.reload_master_weights()
    train(model, optimizer, range(1, 2))
    fresh = PrescribedGradients(seed=7)
    torch.testing.assert_close(model.norm.float(), fresh.norm, rtol=0, atol=2e-2)


def test_frozen_layers_join_in_when_they_are_thawed():
    model = PrescribedGradients()
    for name in ("qkv", "proj"):
        getattr(model, name).requires_grad_(False)
    before = weights(model)
    optimizer = Optimizer(model, settings(), clip_grad=0)
    train(model, optimizer, range(1))
    unchanged = {name for name, weight in weights(model).items() if torch.equal(weight, before[name])}
    assert unchanged == {"qkv", "proj"}
    for param in model.parameters():
        param.requires_grad_(True)
    train(model, optimizer, range(1, 2))
    assert not torch.equal(model.qkv.detach(), before["qkv"])
    assert not torch.equal(model.proj.detach(), before["proj"])


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_a_rate_fraction_outside_the_schedule_is_refused(fraction):
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    with pytest.raises(OptimizerError, match="lr_fraction"):
        optimizer.step(fraction)
    with pytest.raises(OptimizerError, match="thaw_fraction"):
        optimizer.step(1.0, fraction)


@pytest.mark.parametrize("clip", [-1.0, float("nan"), float("inf")])
def test_a_senseless_clip_limit_is_refused(clip):
    with pytest.raises(OptimizerError, match="clip_grad"):
        Optimizer(PrescribedGradients(), settings(), clip_grad=clip)


def test_a_step_without_zero_grad_is_refused():
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    train(model, optimizer, range(1))
    with pytest.raises(OptimizerError, match="zero_grad"):
        optimizer.step(1.0)


def test_a_non_contiguous_parameter_is_refused():
    model = torch.nn.Module()
    model.odd = torch.nn.Parameter(torch.zeros(4, 6).T)
    with pytest.raises(OptimizerError, match="odd: not contiguous"):
        Optimizer(model, settings(), clip_grad=0)


def loaded(optimizer, model, **changes):
    state = optimizer.sharded_state_dict(model.sharded_state_dict())
    tensors = {name: sharded.data.clone() for name, sharded in state["tensors"].items()}
    return {**state, "tensors": tensors, **changes}


def test_state_goes_out_and_comes_back_bit_for_bit():
    first, second = PrescribedGradients(), PrescribedGradients(seed=5)
    one, two = Optimizer(first, settings(), clip_grad=1.0), Optimizer(second, settings(), clip_grad=1.0)
    train(first, one, range(3))
    second.load_state_dict(first.state_dict())
    two.load_state_dict(loaded(one, first))
    train(first, one, range(3, 6))
    train(second, two, range(3, 6))
    assert two.steps == 6
    assert all(torch.equal(weight, weights(first)[name]) for name, weight in weights(second).items())


@pytest.mark.parametrize("absent", [None, {}])
def test_resuming_without_optimizer_state_is_refused(absent):
    optimizer = Optimizer(PrescribedGradients(), settings(), clip_grad=0)
    with pytest.raises(OptimizerStateError, match=r"no optimizer state.*finetune"):
        optimizer.load_state_dict(absent)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda s: s.update(schema="vpmoe.optimizer/9"), "vpmoe.optimizer/9"),
        (lambda s: s.update(algorithm="adam"), "adam"),
        (lambda s: s.update(step=-1), "step is -1"),
        (lambda s: s.update(step=True), "step is True"),
        (lambda s: s["tensors"].pop("qkv.momentum_buffer"), r"1 tensors missing \['qkv.momentum_buffer'\]"),
        (lambda s: s["tensors"].update(extra=torch.zeros(1)), r"1 unknown \['extra'\]"),
        (
            lambda s: s["tensors"].update({"weight1.second_momentum_buffer": torch.zeros(4, 6)}),
            r"weight1.second_momentum_buffer.*expected.*\[4, 6, 1\].*found.*\[4, 6\]",
        ),
        (lambda s: s["tensors"].update({"norm.exp_avg": torch.zeros(8).bfloat16()}), "bfloat16"),
        (lambda s: s["tensors"].update({"norm.exp_avg": [0.0]}), "expected a tensor, found list"),
    ],
)
def test_state_that_does_not_fit_is_refused_and_nothing_is_taken_over(damage, message):
    source = PrescribedGradients()
    trained = Optimizer(source, settings(), clip_grad=0)
    train(source, trained, range(1))
    state = loaded(trained, source)
    damage(state)
    optimizer = Optimizer(PrescribedGradients(), settings(), clip_grad=0)
    with pytest.raises(OptimizerStateError, match=message):
        optimizer.load_state_dict(state)
    assert optimizer.steps == 0
    assert not any(tensor.any() for tensor in state_of(optimizer).values())


def test_state_cannot_be_placed_without_the_models_own_places():
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    places = model.sharded_state_dict()
    del places["proj"]
    with pytest.raises(OptimizerStateError, match=r"proj \[8, 12\]"):
        optimizer.sharded_state_dict(places)


def test_closing_releases_the_model():
    model = PrescribedGradients()
    optimizer = Optimizer(model, settings(), clip_grad=0)
    optimizer.close()
    model.qkv.sum().backward()
    assert model.qkv.grad is not None
    Optimizer(model, settings(), clip_grad=0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: the optimizer did not run on one")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_on_cuda_training_follows_the_cpu_and_resumes_bit_for_bit(dtype):
    """Orthogonalisation runs in bfloat16 there, so updates differ by its rounding."""
    reference = PrescribedGradients()
    expected = train(reference, Optimizer(reference, settings(), clip_grad=1.0), range(4))
    model = PrescribedGradients(dtype=dtype).cuda()
    optimizer = Optimizer(model, settings(), clip_grad=1.0)
    stats = train(model, optimizer, range(2))
    twin = PrescribedGradients(dtype=dtype, seed=5).cuda()
    resumed = Optimizer(twin, settings(), clip_grad=1.0)
    twin.load_state_dict(model.state_dict())
    resumed.load_state_dict(loaded(optimizer, model))
    stats += train(model, optimizer, range(2, 4))
    train(twin, resumed, range(2, 4))
    rounding = 1e-5 if dtype is torch.float32 else 1e-3  # a bfloat16 weight's gradient is bfloat16
    assert [s.grad_norm for s in stats] == pytest.approx([s.grad_norm for s in expected], rel=rounding)
    for name, weight in weights(model).items():
        torch.testing.assert_close(weight.float().cpu(), weights(reference)[name], rtol=2e-2, atol=3e-3)
        assert torch.equal(weight, weights(twin)[name])
