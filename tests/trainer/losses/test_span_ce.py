"""The objective `span_ce` through the seam that the engine uses, against a dense computation in float64."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from tests.trainer.train.train_jobs import tiny_recipe
from trainer.contract.kinds import CONVERSATIONS, TEXT
from trainer.contract.schema.base import ConfigError, parse
from trainer.contract.schema.training import TrainRecipe
from trainer.contract.words import OBJECTIVES, words
from trainer.errors import LossError
from trainer.losses.common.objective import Objective, load_objective
from trainer.model.cross_entropy import chunked_cross_entropy

B, S, H, V = 2, 9, 6, 23


def recipe(**changes) -> TrainRecipe:
    return parse(TrainRecipe, tiny_recipe(**changes))


class Head(torch.nn.Module):
    """An output head and the loss of the reference backend."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(3)
        self.weight = torch.nn.Parameter(torch.randn(V, H, generator=generator, dtype=torch.float64))

    def cross_entropy(self, hidden, labels, weights, select):
        flat = hidden.transpose(0, 1).reshape(-1, H)
        flags = (labels.reshape(-1), weights.reshape(-1))
        loss, each = chunked_cross_entropy(flat, self.weight, *flags, select=select.reshape(-1))
        return loss, each.view(labels.shape)


def micro_batch(seed: int, spans: tuple[int, ...]):
    """Hidden states `[S, B, H]` and a batch with these span ids, some tokens of it unsupervised."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.tensor(spans)[torch.randint(len(spans), (B, S), generator=generator)]
    mask = (torch.rand(B, S, generator=generator) < 0.7).float()
    hidden = torch.randn(S, B, H, generator=generator, dtype=torch.float64).requires_grad_()
    labels = torch.randint(V, (B, S), generator=generator)
    return hidden, {"labels": labels, "loss_mask": mask, "span_id": torch.where(mask > 0, chosen, 0)}


def dense(head, parts):
    """Token losses and span ids of all supervised tokens, one after the other."""
    losses, ids = [], []
    for hidden, batch in parts:
        logits = (hidden.transpose(0, 1) @ head.weight.T).flatten(0, 1)
        each = F.cross_entropy(logits, batch["labels"].flatten(), reduction="none")
        keep = batch["loss_mask"].flatten() > 0
        losses.append(each[keep])
        ids.append(batch["span_id"].flatten()[keep])
    return torch.cat(losses), torch.cat(ids)


def run(objective, head, parts, samples):
    """Loss, gradients of head and hidden states, and metrics of one global batch."""
    step = objective.start([batch for _, batch in parts], samples, None)
    head.weight.grad = None
    total = 0.0
    for hidden, batch in parts:
        hidden.grad = None
        loss = step.loss(head, hidden, batch)
        loss.backward()
        total += loss.item()
    return total, [head.weight.grad, *(hidden.grad.clone() for hidden, _ in parts)], step.metrics()


def by_formula(kind, losses, ids, samples):
    """Each objective written out: conversations by weighted means or as one pool, text as one mean."""
    talk, text = samples.get(CONVERSATIONS, 0), samples.get(TEXT, 0)
    value = torch.zeros((), dtype=torch.float64)
    if talk and kind == "weighted":
        value = value + talk / (talk + text) * (0.5 * losses[ids == 1].mean() + 2.0 * losses[ids == 2].mean())
    elif talk:
        value = value + talk / (talk + text) * losses[(ids == 1) | (ids == 2)].mean()
    if text:
        value = value + text / (talk + text) * losses[ids == 3].mean()
    return value


@pytest.mark.parametrize("kind", ["weighted", "pooled"])
@pytest.mark.parametrize("samples", [{CONVERSATIONS: 4}, {CONVERSATIONS: 3, TEXT: 1}], ids=["one", "mixed"])
def test_loss_and_gradients_are_those_of_the_formula(kind, samples):
    kd = {"span_weight_reasoning": 0.5, "span_weight_final": 2.0} if kind == "weighted" else None
    objective = load_objective("span_ce").of(recipe(kd=kd), samples)
    spans = (1, 2, 3) if TEXT in samples else (1, 2)
    head, parts = Head(), [micro_batch(seed, spans) for seed in (1, 2)]
    loss, gradients, metrics = run(objective, head, parts, samples)
    expected = by_formula(kind, *dense(head, parts), samples)
    wanted = torch.autograd.grad(expected, [head.weight, *(hidden for hidden, _ in parts)])
    assert loss == pytest.approx(expected.item(), rel=1e-6)
    assert metrics["loss"] == pytest.approx(expected.item(), rel=1e-6)
    for ours, theirs in zip(gradients, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=1e-9)
    losses, ids = dense(head, parts)
    for number, name in zip(spans, objective.names, strict=True):
        assert metrics[f"loss/{name}"] == pytest.approx(losses[ids == number].mean().item())
        assert metrics[f"tokens/{name}"] == int((ids == number).sum())


def test_the_value_of_measured_samples_is_the_loss_of_the_same_global_batch():
    samples = {CONVERSATIONS: 3, TEXT: 1}
    objective = load_objective("span_ce").of(recipe(kd=None), samples)
    head, parts = Head(), [micro_batch(seed, (1, 2, 3)) for seed in (5, 6)]
    trained, _, metrics = run(objective, head, parts, samples)
    each = torch.cat([objective.token_losses(head, hidden, batch).flatten() for hidden, batch in parts])
    ids = torch.cat([batch["span_id"].flatten() for _, batch in parts])
    means = [each[ids == number].mean().item() for number in (1, 2, 3)]
    counts = torch.tensor([float((ids == number).sum()) for number in (1, 2, 3)])
    assert objective.value(means, counts, {CONVERSATIONS: 0.75, TEXT: 0.25}) == pytest.approx(trained)
    assert metrics["loss"] == pytest.approx(trained)
    assert torch.equal(each[ids == 0], torch.zeros(int((ids == 0).sum()), dtype=each.dtype))


def test_a_batch_without_anything_to_train_on_is_refused_before_the_forward_pass():
    objective = load_objective("span_ce").of(recipe(), [CONVERSATIONS])
    _, batch = micro_batch(1, (1, 2))
    batch["loss_mask"] = torch.zeros_like(batch["loss_mask"])
    with pytest.raises(LossError, match="no token to train on"):
        objective.start([batch], {CONVERSATIONS: 2}, None)


def test_absences_are_counted_over_the_life_of_the_objective():
    objective = load_objective("span_ce").of(recipe(), [CONVERSATIONS])
    head = Head()
    for expected in (1, 2):
        _, _, metrics = run(objective, head, [micro_batch(1, (1,))], {CONVERSATIONS: 2})
        assert metrics["absent/final"] == objective.absent["final"] == expected
    assert objective.absent["reasoning"] == 0


def test_weights_of_spans_that_nothing_mixes_in_are_refused():
    with pytest.raises(ConfigError, match=r"recipe\.kd .*recipe\.harmony_fraction = 0 .*leave kd out"):
        load_objective("span_ce").refuse(recipe(harmony_fraction=0.0))
    load_objective("span_ce").refuse(recipe(harmony_fraction=0.0, kd=None))
    load_objective("span_ce").refuse(recipe())


def test_an_unknown_objective_is_refused_with_what_there_is():
    for word in ("topk_lk", "common", "objective", "spans"):
        with pytest.raises(ConfigError, match=rf"recipe\.objective: found '{word}'; allowed: .*'span_ce'"):
            load_objective(word)
        with pytest.raises(ConfigError, match=rf"objective: found '{word}'; allowed: .*'span_ce'"):
            recipe(objective=word)


@pytest.mark.parametrize("word", words(OBJECTIVES))
def test_every_module_beside_it_is_an_objective(word):
    found = load_objective(word)
    assert issubclass(found, Objective)
    assert not found.__abstractmethods__
    assert found.__doc__


def test_an_objective_needs_nothing_of_a_model_but_its_head():
    objective = load_objective("span_ce").of(recipe(), [CONVERSATIONS])
    hidden, batch = micro_batch(1, (1, 2))
    head = SimpleNamespace(cross_entropy=Head().cross_entropy)
    assert objective.start([batch], {CONVERSATIONS: 2}, None).loss(head, hidden, batch).requires_grad
