"""On-policy distillation: the formula, and its expectation over all tokens against the exact reverse KL."""

from typing import Any

import pytest
import torch

from tests.trainer.losses.loss_cases import (
    B,
    Head,
    K,
    S,
    V,
    micro_batch,
    recipe,
    run,
    student_logprobs,
    take,
    teacher_of,
)
from trainer.contract.kinds import CONVERSATIONS, ROLLOUTS
from trainer.contract.schema.base import ConfigError
from trainer.errors import LossError
from trainer.losses.common.objective import load_objective

KINDS = (CONVERSATIONS, ROLLOUTS)
TABLE: dict[str, Any] = {
    "anchor_fraction": 0.25,
    "max_new_tokens": 16,
    "buffer_size": 8,
    "baseline_topk": K,
    "curriculum": [{"until": 1.0, "medium": 1.0, "high": 0.0, "rollouts": 1}],
}


def asked(kd=None, **rollouts: Any):
    weights = kd or {"span_weight_reasoning": 0.7, "span_weight_final": 1.9}
    return recipe(objective="opd", kd=weights, rollouts=TABLE | rollouts)


def objective(**rollouts: Any):
    load_objective("opd").refuse(asked(**rollouts))
    return load_objective("opd").of(asked(**rollouts), KINDS)


def rollout_batch(seed: int, spans=(6, 7)):
    """A micro-batch of rollouts, some of its tokens excluded; and the teacher `[B, S, V]`."""
    hidden, batch = micro_batch(seed, spans)
    teacher = teacher_of(batch, seed + 50)
    generator = torch.Generator().manual_seed(seed)
    batch["behaviour_logprob"] = -3 * torch.rand(B, S, generator=generator)
    batch["excluded"] = torch.rand(B, S, generator=generator) < 0.2
    batch["excluded"][0, : len(spans)] = False
    batch["excluded"] &= batch["span_id"] >= 6
    return (hidden, batch), teacher


def kept_of(batch):
    return (batch["loss_mask"] > 0) & ~batch["excluded"]


def by_formula(head, parts, clip, baseline):
    """The objective written out, advantages as constants; and advantages by span."""
    terms: dict[int, list[torch.Tensor]] = {}
    gaps: dict[int, list[float]] = {}
    for hidden, batch in parts:
        logprobs = student_logprobs(head, hidden)
        for row, t in kept_of(batch).nonzero().tolist():
            span, own = int(batch["span_id"][row, t]), logprobs[row, t]
            lp = own[batch["labels"][row, t]]
            if span < 6:
                terms.setdefault(span, []).append(-lp)
                continue
            gap = float(batch["teacher_label_logprob"][row, t]) - lp.item()
            advantage = max(-clip, min(clip, gap))
            if baseline:
                p = own.detach()[batch["teacher_ids"][row, t]].exp()
                rest, tail = 1 - p.sum(), batch["teacher_tail"][row, t].double()
                expected = (p * (batch["teacher_logprobs"][row, t].double() - p.log())).sum()
                expected = expected + rest * (tail.log() - rest.log())
                advantage -= max(-clip, min(clip, expected.item()))
            terms.setdefault(span, []).append(-advantage * lp)
            gaps.setdefault(span, []).append(gap)
    weights = {1: 0.7 / 4, 2: 1.9 / 4, 6: 0.7 * 3 / 4, 7: 1.9 * 3 / 4}
    return sum(weights[span] * torch.stack(found).mean() for span, found in terms.items()), gaps


@pytest.mark.parametrize("baseline", [False, True], ids=["plain", "baseline"])
def test_loss_and_gradients_are_those_of_the_formula(baseline):
    made, head = objective(advantage_clip=1.5, baseline=baseline), Head()
    parts = [rollout_batch(1)[0], rollout_batch(2, (1, 2, 6, 7))[0]]
    loss, gradients, metrics = run(made, head, parts, {CONVERSATIONS: 1, ROLLOUTS: 3})
    expected, gaps = by_formula(head, parts, 1.5, baseline)
    wanted = torch.autograd.grad(expected, [head.weight, *(hidden for hidden, _ in parts)])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-7)
    for span, name in ((6, "rollout_reasoning"), (7, "rollout_final")):
        assert metrics[f"tokens/{name}"] == len(gaps[span])  # excluded tokens are nowhere
        assert metrics[f"logprob_gap/{name}"] == pytest.approx(sum(gaps[span]) / len(gaps[span]))
        clipped = sum(abs(gap) > 1.5 for gap in gaps[span]) / len(gaps[span])
        assert metrics[f"clipped/{name}"] == pytest.approx(clipped)
        assert (f"baseline/{name}" in metrics) == baseline
    assert any(metrics[f"clipped/{name}"] for name in ("rollout_reasoning", "rollout_final"))
    assert "logprob_gap/reasoning" not in metrics


def test_drift_is_measured_from_what_the_student_was():
    made, head = objective(), Head()
    (hidden, batch), _ = rollout_batch(3, (6,))
    lp = student_logprobs(head, hidden).gather(-1, batch["labels"].unsqueeze(-1)).squeeze(-1)
    drift = (lp - batch["behaviour_logprob"])[kept_of(batch)].mean().item()
    metrics = run(made, head, [(hidden, batch)], {ROLLOUTS: 2})[2]
    assert metrics["behaviour_drift/rollout_reasoning"] == pytest.approx(drift)


def every_token(made, head, hidden, teacher):
    """Chances `[V]` and gradients at the hidden state `[V, H]` of one position, for every token sampled."""
    own = student_logprobs(head, hidden)[0, 0]
    ids = teacher.topk(K).indices
    tail = 1 - teacher[ids].exp().sum()
    gradients = []
    for token in range(V):
        batch = {
            "labels": torch.tensor([[token]]),
            "loss_mask": torch.ones(1, 1),
            "span_id": torch.tensor([[6]]),
            "teacher_label_logprob": teacher[token].view(1, 1),
            "behaviour_logprob": own[token].detach().view(1, 1),
            "excluded": torch.zeros(1, 1, dtype=torch.bool),
            "teacher_ids": ids.view(1, 1, K),
            "teacher_logprobs": teacher[ids].view(1, 1, K),
            "teacher_tail": tail.view(1, 1),
        }
        gradients.append(run(made, head, [(hidden, batch)], {ROLLOUTS: 1})[1][1].flatten())
    return own.detach().exp(), torch.stack(gradients)


def test_the_expectation_is_the_gradient_of_the_reverse_kl_and_the_baseline_only_lowers_the_variance():
    generator = torch.Generator().manual_seed(9)
    weights = {"span_weight_reasoning": 1.0, "span_weight_final": 1.0}
    spread = []
    for _ in range(3):
        head = Head()
        hidden = torch.randn(1, 1, 6, generator=generator, dtype=torch.float64).requires_grad_()
        noise = 1.5 * torch.randn(V, generator=generator, dtype=torch.float64)
        teacher = (student_logprobs(head, hidden)[0, 0].detach() + noise).log_softmax(dim=-1)
        own = student_logprobs(head, hidden)[0, 0]
        (exact,) = torch.autograd.grad((own.exp() * (own - teacher)).sum(), hidden)
        variances = []
        for baseline in (False, True):
            made = load_objective("opd").of(asked(weights, baseline=baseline), KINDS)
            chances, gradients = every_token(made, head, hidden, teacher)
            mean = (chances.unsqueeze(1) * gradients).sum(dim=0)
            torch.testing.assert_close(mean, exact.flatten(), rtol=1e-6, atol=1e-8)
            variances.append(float((chances * (gradients - mean).square().sum(dim=1)).sum()))
        spread.append(variances[1] / variances[0])
    assert sum(spread) / len(spread) < 0.9, spread


def test_any_split_into_micro_batches_has_the_same_gradient():
    made = objective(baseline=True, advantage_clip=2.0)
    whole = [rollout_batch(seed, spans)[0] for seed, spans in ((1, (6, 7)), (2, (1, 2)), (3, (1, 6)))]
    results = []
    for split in ([[0, 1, 2, 3, 4, 5]], [[0, 4], [1, 2, 3], [5]]):
        head = Head()
        parts = [take(whole, rows) for rows in split]
        loss, gradients, metrics = run(made, head, parts, {CONVERSATIONS: 2, ROLLOUTS: 4})
        results.append((loss, gradients[0], metrics))
    assert results[1][0] == pytest.approx(results[0][0], rel=1e-9)
    torch.testing.assert_close(results[1][1], results[0][1])
    for name, value in results[0][2].items():
        assert results[1][2][name] == pytest.approx(value, rel=1e-9), name


def test_an_anchor_batch_needs_no_field_of_rollouts():
    made, head = objective(), Head()
    parts = [rollout_batch(1)[0], micro_batch(2, (1, 2))]
    loss, gradients, _ = run(made, head, parts, {CONVERSATIONS: 1, ROLLOUTS: 3})
    assert torch.isfinite(torch.tensor(loss))
    assert gradients[2].any()


@pytest.mark.parametrize("field", ["teacher_label_logprob", "behaviour_logprob", "excluded", "teacher_ids"])
def test_rollouts_without_a_field_are_refused_before_the_forward_pass(field):
    _, batch = rollout_batch(1)[0]
    del batch[field]
    with pytest.raises(LossError, match=rf"tokens of rollout_reasoning, rollout_final and no {field}"):
        objective(baseline=True).start([batch], {ROLLOUTS: 2}, None)


def test_recipes_that_it_cannot_follow_are_refused():
    with pytest.raises(ConfigError, match=r"recipe\.rollouts: missing.*add the table"):
        load_objective("opd").refuse(recipe(objective="opd"))
    with pytest.raises(ConfigError, match=r"baseline = true with recipe\.rollouts\.temperature = 0\.7"):
        load_objective("opd").refuse(asked(baseline=True, temperature=0.7))
    with pytest.raises(ConfigError, match=r"recipe\.rollouts: given.*'span_ce'.*objective = 'opd'"):
        load_objective("span_ce").refuse(asked())
