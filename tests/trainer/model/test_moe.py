import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.model import router
from trainer.model.dispatch import assign
from trainer.model.gpt import build_model


def naive(layer, hidden: torch.Tensor, padding: torch.Tensor | None = None) -> torch.Tensor:
    """Each token through its experts and the shared one, in float64."""
    weights, chosen = layer.router(hidden, padding)
    flat = hidden.flatten(0, 1).double()

    def ffn(z, w1, b1, w2, b2):
        return w2.double() @ torch.relu(w1.double() @ z + b1.double()) ** 2 + b2.double()

    experts, shared = layer.experts, layer.shared_experts
    out = torch.zeros_like(flat)
    for token, z in enumerate(flat):
        for weight, expert in zip(weights[token], chosen[token], strict=True):
            if expert < 8:
                e = int(expert)
                out[token] += weight.double() * ffn(
                    z, experts.weight1[e], experts.bias1[e], experts.weight2[e], experts.bias2[e]
                )
        if shared is not None:
            fc1, fc2 = shared.linear_fc1, shared.linear_fc2
            out[token] += ffn(z, fc1.weight, fc1.bias, fc2.weight, fc2.bias)
    return out.view_as(hidden)


@pytest.mark.parametrize("shared", [True, False])
def test_layer_equals_a_loop_over_tokens(shared):
    model = randomize(build_model(tiny("moe", moe={"shared_expert": shared})))
    layer = model.moe_layers[0]
    hidden = torch.randn(9, 2, 32, generator=torch.Generator().manual_seed(0))
    output, bias = layer(hidden)
    assert bias is None
    torch.testing.assert_close(output.double(), naive(layer, hidden), rtol=1e-4, atol=1e-4)


def test_padding_meets_the_shared_expert_only():
    layer = randomize(build_model(tiny("moe"))).moe_layers[0]
    hidden = torch.randn(6, 2, 32, generator=torch.Generator().manual_seed(0))
    padding = torch.zeros(2, 6, dtype=torch.bool)
    padding[1, 4:] = True
    output, _ = layer(hidden, padding_mask=padding)
    torch.testing.assert_close(output.double(), naive(layer, hidden, padding), rtol=1e-4, atol=1e-4)
    shared, shared_bias = layer.shared_experts(hidden)
    torch.testing.assert_close(output[4:, 1], (shared + shared_bias)[4:, 1])


def test_a_batch_of_padding_alone_runs_and_gives_every_expert_a_gradient():
    model = build_model(tiny("moe"))
    model(*rows([[], []], width=5)).sum().backward()
    experts = model.moe_layers[0].experts
    assert all(p.grad is not None and not p.grad.any() for p in experts.parameters())
    assert model.pop_aux_loss().item() == 0.0


def test_gradients_equal_the_loops():
    model = randomize(build_model(tiny("moe")))
    layer = model.moe_layers[0]
    hidden = torch.randn(9, 2, 32, generator=torch.Generator().manual_seed(0))
    gradients = []
    for function in (lambda x: layer(x)[0].double(), lambda x: naive(layer, x)):
        layer.zero_grad()
        x = hidden.clone().requires_grad_()
        function(x).square().sum().backward()
        gradients.append([x.grad, *(p.grad.clone() for p in layer.parameters())])
    for ours, expected in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())


def test_the_shared_experts_down_bias_is_added_and_trained():
    model = build_model(tiny("moe"))
    layer = model.moe_layers[0]
    hidden = torch.randn(4, 1, 32)
    before, _ = layer(hidden)
    with torch.no_grad():
        layer.shared_experts.linear_fc2.bias += 1.0
    after, _ = layer(hidden)
    torch.testing.assert_close(after - before, torch.ones_like(before))
    after.sum().backward()
    assert (layer.shared_experts.linear_fc2.bias.grad == 4).all()


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(0, 20), topk=st.integers(1, 4), seed=st.integers(0, 2**31), drop=st.booleans())
def test_sorting_loses_and_doubles_no_pair(tokens, topk, seed, drop):
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.stack(
        [torch.randperm(6, generator=generator)[:topk] for _ in range(tokens)] or [torch.zeros(topk)]
    )
    chosen = chosen[:tokens].long().view(tokens, topk)
    if drop and tokens:
        chosen[0] = 6
    pairs = assign(chosen, 6)
    assert pairs.counts == [(chosen == expert).sum().item() for expert in range(6)]
    x = torch.randn(tokens, 3, generator=generator).double().requires_grad_()
    taken = pairs.take(x)
    expert_of_row = torch.arange(6).repeat_interleave(torch.tensor(pairs.counts))
    assert torch.equal(chosen.reshape(-1)[pairs.order], expert_of_row)
    kept = (chosen < 6).sum(dim=1, keepdim=True)
    combined = pairs.combine(taken)
    torch.testing.assert_close(combined, (x * kept).double(), rtol=1e-6, atol=1e-6)
    combined.sum().backward()
    torch.testing.assert_close(x.grad, kept.expand_as(x).double())


def test_first_layer_is_dense_with_its_own_width_only_when_asked():
    layers = build_model(tiny("moe"), device="meta").decoder.layers
    assert layers[0].mlp.linear_fc1.weight.shape == (12, 32)
    assert layers[1].mlp.experts.weight1.shape == (8, 6, 32)
    assert layers[1].mlp.experts.weight2.shape == (8, 32, 6)
    assert layers[1].mlp.shared_experts.linear_fc1.weight.shape == (10, 32)
    every = build_model(tiny("moe", moe={"first_layer_dense": False}), device="meta")
    assert every.moe_layer_numbers == [1, 2, 3, 4]


def test_a_moe_model_runs_in_bf16():
    exact = randomize(build_model(tiny("moe")))
    model = randomize(build_model(tiny("moe"), dtype=torch.bfloat16))
    batch = rows([[12, 9]], width=24)
    logits = model(*batch)
    assert logits.dtype == torch.bfloat16
    logits.float().logsumexp(-1).sum().backward()
    assert all(p.grad.isfinite().all() for p in model.parameters())
    error = (logits.float() - exact(*batch)).norm() / exact(*batch).norm()
    assert error < 0.2


BF16_ROUNDOFF = 2.0**-9
ROUNDINGS_OF_A_LAYER = 10
"""Norm, projection, attention, projection, sum; norm, projection, activation, projection, sum."""


def difference(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> float:
    """Relative error of all tensors together, in the Frobenius norm."""
    off = sum(float((found[name].double() - expected[name].double()).square().sum()) for name in expected)
    return (off / sum(float(tensor.double().square().sum()) for tensor in expected.values())) ** 0.5


def passes(model: torch.nn.Module, batch: tuple[torch.Tensor, ...]) -> tuple[dict[str, torch.Tensor], ...]:
    """Hidden states, and the gradients of a fixed linear function of them."""
    hidden = model.forward_hidden(*batch)
    target = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(3))
    (hidden.float() * target).mean().backward()
    return {"hidden": hidden.detach()}, {
        name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None
    }


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_bfloat16_with_the_same_routing_is_as_close_to_float32_as_its_roundings_allow(seed, monkeypatch):
    """Left to itself a bf16 router sends some tokens elsewhere, and one such flip outweighs all rounding.

    So the fp32 router's choice is imposed. What is left are roundings of relative size u = 2⁻⁹, about ten in
    a row for each layer; independent ones add up in their squares: u · √(10 · layers) forward, and through
    twice as many operations backward.
    """
    wide = randomize(build_model(tiny("moe"), seed=seed), seed)
    narrow = build_model(tiny("moe"), dtype=torch.bfloat16, seed=seed)
    narrow.load_state_dict(wide.state_dict())
    wide.load_state_dict(narrow.state_dict())
    batch = rows([[40, 24], [64], [17, 30, 9], [64]])

    chosen: list[torch.Tensor] = []
    select = router.select_experts

    def recording(*arguments):
        chosen.append(select(*arguments))
        return chosen[-1]

    monkeypatch.setattr(router, "select_experts", recording)
    exact, exact_gradients = passes(wide, batch)
    imposed = [choice.clone() for choice in chosen]
    chosen.clear()
    free, _ = passes(narrow, batch)
    flips = [(a.sort(-1).values != b.sort(-1).values).any(-1) for a, b in zip(imposed, chosen, strict=True)]
    assert len(imposed) == len(wide.moe_layers)
    assert torch.stack(flips).any()

    narrow.zero_grad()
    choices = iter(imposed)
    monkeypatch.setattr(router, "select_experts", lambda *arguments: next(choices))
    found, gradients = passes(narrow, batch)
    assert next(choices, None) is None
    bound = BF16_ROUNDOFF * (ROUNDINGS_OF_A_LAYER * len(wide.decoder.layers)) ** 0.5
    assert difference(free, exact) > bound
    assert difference(found, exact) < bound
    assert gradients.keys() == exact_gradients.keys()
    assert difference(gradients, exact_gradients) < 2**0.5 * bound
