"""Cross-entropy weighed by the teacher, against the formula in NumPy's float64."""

import numpy as np
import pytest
import torch

from tests.trainer.losses.loss_cases import (
    MANIFEST,
    MEANS,
    Head,
    micro_batch,
    recipe,
    run,
    scored_batch,
    scored_table,
    student_logprobs,
)
from trainer.contract.kinds import CONVERSATIONS, SCORED
from trainer.contract.schema.base import ConfigError
from trainer.errors import LossError
from trainer.losses.common.objective import load_objective

TERMS = {"tau": 0.8, "w_min": 0.3, "w_max": 2.5}
KD = {"span_weight_reasoning": 0.7, "span_weight_final": 1.9, "rescored": TERMS}


def objective(**changes):
    asked = recipe(**({"objective": "rescored_ce", "kd": KD, "scored": scored_table()} | changes))
    load_objective("rescored_ce").refuse(asked)
    return load_objective("rescored_ce").of(asked, (SCORED, CONVERSATIONS))


def test_loss_and_gradients_are_those_of_the_formula():
    made, head = objective(), Head()
    made.use_store(MANIFEST)
    parts = [scored_batch(1)[0], scored_batch(2, (1, 2, 4, 5))[0], micro_batch(3, (1, 2))]
    loss, gradients, metrics = run(made, head, parts, {SCORED: 3, CONVERSATIONS: 1})
    terms: dict[int, list[torch.Tensor]] = {}
    weights: dict[int, list[float]] = {}
    for hidden, batch in parts:
        logprobs = student_logprobs(head, hidden)
        for row, t in (batch["loss_mask"] > 0).nonzero().tolist():
            span = int(batch["span_id"][row, t])
            weight = 1.0
            if span >= 4:
                lift = (
                    float(batch["teacher_label_logprob"][row, t])
                    - MEANS["reasoning" if span == 4 else "final"]
                )
                weight = float(np.clip(np.exp(lift / 0.8), 0.3, 2.5))
                weights.setdefault(span, []).append(weight)
            terms.setdefault(span, []).append(-weight * logprobs[row, t, batch["labels"][row, t]])
    scale = {1: 0.7 / 4, 2: 1.9 / 4, 4: 0.7 * 3 / 4, 5: 1.9 * 3 / 4}
    expected = sum(scale[span] * torch.stack(found).mean() for span, found in terms.items())
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["rescoring/scored_final"] == pytest.approx(np.mean(weights[5]), rel=1e-6)
    wanted = torch.autograd.grad(expected, [head.weight, *(hidden for hidden, _ in parts)])
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=2e-6, atol=1e-8)
    measured = made.token_measures(head, *parts[0])
    final = parts[0][1]["span_id"] == 5
    lifted = measured["loss"] * made.rescoring.weights(parts[0][1])
    torch.testing.assert_close(measured["objective"][final], lifted[final])
    torch.testing.assert_close(measured["loss"], made.token_losses(head, *parts[0]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"scored": None, "kd": None}, r"recipe\.scored: missing"),
        ({"kd": {"span_weight_final": 2.0}}, r"recipe\.kd\.rescored: missing.*give rescored = \{ tau"),
        ({"kd": KD | {"kl_weight": 0.5}}, r"recipe\.kd\.kl_weight = 0\.5.*no divergence.*'topk_kl'"),
        ({"kd": KD | {"target": "mix"}}, r"recipe\.kd\.target = 'mix'.*no divergence"),
    ],
)
def test_recipes_that_it_cannot_follow_are_refused(changes, message):
    with pytest.raises(ConfigError, match=message):
        objective(**changes)


def test_a_batch_without_the_teachers_log_probabilities_is_refused():
    made = objective()
    with pytest.raises(LossError, match="before the first step"):
        made.start([scored_batch(1)[0][1]], {SCORED: 2}, None)
    made.use_store(MANIFEST)
    with pytest.raises(LossError, match="no teacher_label_logprob"):
        made.start([micro_batch(1, (4, 5))[1]], {SCORED: 2}, None)
