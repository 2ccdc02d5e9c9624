import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.transformer.moe.moe_utils import topk_routing_with_score_function
from transformers import DeepseekV3Config
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3TopkRouter

from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.model.gpt import build_model
from trainer.model.router import route, sequence_aux_loss

LOCKED = {"num_groups": 8, "group_topk": 4, "scaling_factor": 2.5}


def locked_logits(experts: int = 256) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(512, experts, generator=generator), 0.1 * torch.randn(experts, generator=generator)


def dense(weights: torch.Tensor, chosen: torch.Tensor, experts: int) -> torch.Tensor:
    return torch.zeros(len(weights), experts).scatter(1, chosen, weights)


@pytest.mark.parametrize("score_function", ["sigmoid", "softmax"])
@pytest.mark.parametrize("groups", [LOCKED, {"scaling_factor": 2.5}])
@pytest.mark.parametrize("topk", [1, 4])
def test_choice_and_weights_equal_megatrons(score_function, groups, topk):
    if topk == 1 and "group_topk" in groups:
        groups = {**groups, "group_topk": 1}
    logits, bias = locked_logits()
    bias = bias if score_function == "sigmoid" else None
    weights, chosen = route(logits, topk=topk, score_function=score_function, expert_bias=bias, **groups)
    expected, routed = topk_routing_with_score_function(
        logits, topk, score_function=score_function, expert_bias=bias, **groups
    )
    ours = dense(weights, chosen, 256)
    assert ((ours > 0) == routed).all(dim=1).sum() == 512
    torch.testing.assert_close(ours, expected)


def test_choice_and_weights_equal_transformers_deepseek_v3():
    logits, bias = locked_logits()
    router = DeepseekV3TopkRouter(
        DeepseekV3Config(
            hidden_size=256,
            n_routed_experts=256,
            num_experts_per_tok=8,
            n_group=8,
            topk_group=4,
            norm_topk_prob=True,
            routed_scaling_factor=2.5,
        )
    )
    with torch.no_grad():
        router.weight.copy_(torch.eye(256))  # hidden states are then the logits
        router.e_score_correction_bias.copy_(bias)
    _logits, expected, indices = router(logits)
    weights, chosen = route(logits, topk=8, expert_bias=bias, **LOCKED)
    ours, theirs = dense(weights, chosen, 256), dense(expected, indices, 256)
    assert ((ours > 0) == (theirs > 0)).all(dim=1).sum() == 512
    torch.testing.assert_close(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**31),
    groups=st.sampled_from([2, 4, 8]),
    group_topk=st.sampled_from([1, 2]),
    per_group=st.sampled_from([1, 2]),
)
def test_a_token_stays_in_its_best_groups_and_its_weights_sum_to_the_factor(
    seed, groups, group_topk, per_group
):
    generator = torch.Generator().manual_seed(seed)
    logits, bias = torch.randn(32, 32, generator=generator), torch.randn(32, generator=generator)
    weights, chosen = route(
        logits,
        topk=group_topk * per_group,
        expert_bias=bias,
        num_groups=groups,
        group_topk=group_topk,
        scaling_factor=2.5,
    )
    assert all(len(set(row.tolist())) == group_topk * per_group for row in chosen)
    used = [set((row // (32 // groups)).tolist()) for row in chosen]
    assert max(map(len, used)) <= group_topk
    if group_topk * per_group > 1:
        torch.testing.assert_close(weights.sum(dim=1), torch.full((32,), 2.5))
    selection = (logits.sigmoid() + bias).view(32, groups, -1)
    score = selection.topk(per_group, dim=-1).values.sum(-1)
    best = score.topk(group_topk, dim=-1).indices
    assert all(seen <= set(allowed.tolist()) for seen, allowed in zip(used, best, strict=True))


def test_expert_bias_steers_the_choice_and_not_the_weights():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    weights, chosen = route(logits, topk=2, expert_bias=torch.tensor([0.0, 0.0, 0.0, 5.0]))
    assert sorted(chosen[0].tolist()) == [0, 3]
    scores = logits.sigmoid()[0]
    expected = scores[chosen[0]] / (scores[0] + scores[3])
    torch.testing.assert_close(weights[0], expected)


def test_aux_loss_is_one_when_the_load_is_even():
    """Every expert the favourite of as many tokens as the others, on rows of any length."""
    scores = torch.eye(8).repeat(3, 1)[:, None, :] * 0.5 + 0.25
    valid = torch.ones(24, 1, dtype=torch.bool)
    assert sequence_aux_loss(scores, 1, valid).item() == pytest.approx(1.0)
    alike = torch.rand(24, 1, 8, generator=torch.Generator().manual_seed(0))
    alike[:] = alike[:1]
    assert sequence_aux_loss(alike, 1, valid).item() > 1.0


def test_aux_loss_equals_explicit_sums():
    generator = torch.Generator().manual_seed(0)
    scores = torch.rand(10, 3, 6, generator=generator)
    valid = torch.ones(10, 3, dtype=torch.bool)
    valid[7:, 1], valid[:, 2] = False, False
    rows_ = []
    for b in range(3):
        tokens = [t for t in range(10) if valid[t, b]]
        shares = [scores[t, b] / scores[t, b].sum() for t in tokens]
        total = 0.0
        for e in range(6):
            hits = sum(e in share.topk(2).indices.tolist() for share in shares)
            total += float(sum(share[e] for share in shares)) * hits
        rows_.append(6 / (2 * len(tokens) ** 2) * total if tokens else 0.0)
    assert sequence_aux_loss(scores, 2, valid).item() == pytest.approx(sum(rows_) / 3, rel=1e-5)


def test_padding_moves_neither_aux_loss_nor_counts():
    model = randomize(build_model(tiny("moe")))
    short, long = rows([[10]]), rows([[10]], width=25)
    found = []
    for batch in (short, long):
        model.reset_router_counts()
        model.forward_hidden(*batch)
        found.append((model.pop_aux_loss().item(), model.router_counts()))
    assert found[0][0] == pytest.approx(found[1][0], rel=1e-5)
    assert torch.equal(found[0][1], found[1][1])
    assert found[0][1].shape == (3, 8)
    assert found[0][1].dtype == torch.int64
    assert found[0][1].sum(dim=1).tolist() == [20, 20, 20]


def test_rows_in_line_are_routed_and_balanced_as_rows_side_by_side():
    model = randomize(build_model(tiny("moe")))
    router = model.moe_layers[0].router
    hidden = torch.randn(7, 3, model.config.hidden_size, generator=torch.Generator().manual_seed(1))
    padding = torch.zeros(3, 7, dtype=torch.bool)
    padding[1, 4:] = True
    found = []
    for tokens in (hidden, hidden.transpose(0, 1).reshape(21, 1, -1)):
        model.reset_router_counts()
        weights, chosen = router(tokens, padding)
        found.append((weights, chosen, router.aux_loss, router.tokens_per_expert.clone()))
    (weights, chosen, aux, counts), line = found
    order = torch.arange(21).view(7, 3).t().flatten()
    assert torch.equal(line[1], chosen[order])
    torch.testing.assert_close(line[0], weights[order])
    torch.testing.assert_close(line[2], aux)
    assert torch.equal(line[3], counts)


def test_aux_loss_is_taken_once_and_reaches_the_router_only_through_scores():
    model = randomize(build_model(tiny("moe")))
    model.forward_hidden(*rows([[12]]))
    loss = model.pop_aux_loss()
    # 3 MoE layers; at coefficient 0.1 an even load gives 0.3
    assert 0.29 < loss.item() < 1.2
    assert model.pop_aux_loss().item() == 0.0
    loss.backward()
    routers = [layer.router for layer in model.moe_layers]
    assert all((router.weight.grad != 0).any() for router in routers)
    assert all(layer.experts.weight1.grad is None for layer in model.moe_layers[-1:])


def test_counts_and_aux_loss_belong_to_training_passes():
    model = build_model(tiny("moe"))
    batch = rows([[12]])
    with torch.no_grad():
        model(*batch)
    model.eval()(*batch)
    assert model.router_counts().sum() == 0
    assert model.pop_aux_loss().item() == 0.0
    model.train()(*batch)
    model(*batch)
    assert model.router_counts().sum(dim=1).tolist() == [48, 48, 48]
    model.reset_router_counts()
    assert model.router_counts().sum() == 0


def test_no_balancing_leaves_no_aux_loss():
    model = build_model(tiny("moe", moe={"router_load_balancing_type": "none"}))
    model.forward_hidden(*rows([[12]]))
    assert model.pop_aux_loss().item() == 0.0


def test_expert_bias_moves_by_the_sign_of_the_missing_load():
    model = build_model(tiny("moe"))
    assert model.moe_layer_numbers == [2, 3, 4]
    counts = torch.tensor([[5, 5, 5, 5, 5, 5, 5, 5], [10, 10, 0, 0, 5, 5, 5, 5], [8, 0, 0, 0, 0, 0, 0, 0]])
    model.update_expert_bias(counts)
    rate = 1e-3
    expected = torch.tensor(
        [[0.0] * 8, [-rate, -rate, rate, rate, 0, 0, 0, 0], [-rate, *[rate] * 7]], dtype=torch.float32
    )
    torch.testing.assert_close(model.expert_biases(), expected, rtol=0, atol=0)
    model.update_expert_bias(counts)
    torch.testing.assert_close(model.expert_biases(), 2 * expected)


def test_expert_bias_is_saved_and_stays_fp32():
    model = build_model(tiny("moe"), dtype=torch.bfloat16)
    model.update_expert_bias(torch.arange(24).view(3, 8))
    assert model.expert_biases().dtype == torch.float32
    before = model.expert_biases()
    model.float().bfloat16()
    assert torch.equal(model.expert_biases(), before)
    saved = {name for name in model.state_dict() if "router" in name}
    assert "decoder.layers.1.mlp.router.expert_bias" in saved
    assert not any("tokens_per_expert" in name for name in saved)


def test_without_expert_bias_there_is_none_to_move():
    model = build_model(tiny("moe", moe={"router_enable_expert_bias": False}))
    assert model.expert_biases() is None
    model.update_expert_bias(torch.arange(24).view(3, 8))


def test_logits_are_fp32_for_a_bf16_model_and_fp64_when_asked():
    for dtype, expected in (("fp32", torch.float32), ("fp64", torch.float64)):
        router = (
            build_model(tiny("moe", moe={"router_dtype": dtype}), dtype=torch.bfloat16).moe_layers[0].router
        )
        hidden = torch.randn(4, 1, 32).bfloat16()
        assert router.logits(hidden).dtype == expected
        assert router(hidden, None)[0].dtype == torch.float32


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_an_aux_loss_that_is_not_finite_stops_and_names_its_layer(bad):
    model = build_model(tiny("moe"))
    model.forward_hidden(*rows([[12]]))
    model.moe_layers[1].router.aux_loss *= bad
    with pytest.raises(FloatingPointError, match=r"layer\(s\) 3:"):
        model.pop_aux_loss()
