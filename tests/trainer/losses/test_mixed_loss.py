"""The loss of a batch of texts and conversations: its formula, and one gradient however it is cut."""

import itertools
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import LossError
from trainer.losses.common.mixture import Mixture, Part
from trainer.losses.common.spans import SpanMetrics, SpanWeights, span_counts, token_weights
from trainer.model.cross_entropy import chunked_cross_entropy

S, H, V = 10, 5, 17
POOLED = Mixture(
    (
        Part("conversations", SpanWeights.conversations(), pooled=True),
        Part("text", SpanWeights.text()),
    )
)
WEIGHED = Mixture(
    (Part("conversations", SpanWeights.conversations(0.7, 1.9)), Part("text", SpanWeights.text()))
)


def rows(kinds, seed):
    """One sample a kind: texts almost all supervised (span 3), conversations in spans 0 to 2."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for kind in kinds:
        if kind == "text":
            span_id = torch.full((1, S), 3)
            span_id[0, int(torch.randint(S, (), generator=generator))] = 0
        else:
            span_id = torch.randint(0, 3, (1, S), generator=generator)
        made.append(
            {
                "loss_mask": (span_id > 0).float(),
                "span_id": span_id,
                "labels": torch.randint(V, (1, S), generator=generator),
                "features": torch.randn(1, S, H, generator=generator, dtype=torch.float64),
            }
        )
    return made


def join(samples):
    return {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}


def weights():
    generator = torch.Generator().manual_seed(3)
    return [torch.randn(n, H, generator=generator, dtype=torch.float64).requires_grad_() for n in (H, V)]


def losses(batch, body, head, token_weight):
    return chunked_cross_entropy(
        (batch["features"] @ body.t()).reshape(-1, H),
        head,
        batch["labels"].reshape(-1),
        token_weight.reshape(-1).double(),
        select=batch["loss_mask"].reshape(-1) > 0,
        chunk_tokens=4,
    )


def step(micro_batches, objective, samples):
    body, head = weights()
    counts = span_counts(micro_batches, objective.spans)
    weighted = objective.of_batch(counts, samples)
    metrics = SpanMetrics(objective.spans)
    for batch in micro_batches:
        loss, ce = losses(batch, body, head, token_weights(batch, counts, weighted))
        loss.backward()
        metrics.add(batch, ce)
    return body.grad, head.grad, metrics.reduce(counts, weighted=weighted)


def by_hand(samples, kinds, objective):
    """The formula of the docstring, with means by loops over tokens."""
    body, head = weights()
    ce = {}
    for sample, kind in zip(samples, kinds, strict=True):
        logits = (sample["features"] @ body.t())[0] @ head.t()
        each = torch.nn.functional.cross_entropy(logits, sample["labels"][0], reduction="none")
        for t in range(S):
            span = int(sample["span_id"][0, t])
            if span:
                ce.setdefault(kind, {}).setdefault(span, []).append(each[t])

    def mean(values):
        return sum(values) / len(values)

    total = 0
    for kind, spans in ce.items():
        if kind == "text":
            part = mean(spans[3])
        elif objective is POOLED:
            part = mean([value for values in spans.values() for value in values])
        else:
            part = sum({1: 0.7, 2: 1.9}[span] * mean(values) for span, values in spans.items())
        total = total + kinds.count(kind) / len(kinds) * part
    total.backward()
    return body.grad, head.grad, float(total.detach())


@pytest.mark.parametrize("objective", [POOLED, WEIGHED], ids=["pooled", "weighed"])
@settings(deadline=None, max_examples=25)
@given(
    kinds=st.lists(st.sampled_from(["text", "conversations"]), min_size=1, max_size=6),
    seed=st.integers(0, 10**6),
)
def test_the_gradient_is_that_of_the_formula_in_every_split(objective, kinds, seed):
    samples = rows(kinds, seed)
    counted = {kind: kinds.count(kind) for kind in set(kinds)}
    body, head, value = by_hand(samples, kinds, objective)
    shuffled = random.Random(seed).sample(samples, len(samples))
    splits = [[[sample] for sample in samples], [samples], [[sample] for sample in shuffled]]
    if len(samples) > 2:
        splits.append([shuffled[:1], shuffled[1:]])
    for split in splits:
        found = step([join(part) for part in split], objective, counted)
        # token weights are float32, as in training
        torch.testing.assert_close(found[0], body, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(found[1], head, rtol=1e-6, atol=1e-7)
        assert found[2]["loss"] == pytest.approx(value, rel=1e-9)


def test_a_batch_of_one_kind_has_that_kinds_own_loss():
    for kinds, own in ((["text"] * 3, SpanWeights.text()), (["conversations"] * 3, None)):
        samples = rows(kinds, 1)
        objective = own or SpanWeights.conversations(0.7, 1.9)
        counts = span_counts(samples, WEIGHED.spans)
        mixed = WEIGHED.of_batch(counts, {kinds[0]: 3})
        for sample in samples:
            alone = token_weights(sample, span_counts(samples, objective), objective)
            assert torch.equal(token_weights(sample, counts, mixed), alone)


def test_the_lengths_and_masks_of_samples_do_not_change_their_kinds_share():
    for kinds in itertools.product(["text", "conversations"], repeat=4):
        counted = {kind: kinds.count(kind) for kind in set(kinds)}
        samples = rows(kinds, 5)
        counts = span_counts(samples, POOLED.spans)
        weighted = POOLED.of_batch(counts, counted)
        by_part = dict.fromkeys(counted, 0.0)
        for sample, kind in zip(samples, kinds, strict=True):
            by_part[kind] += float(token_weights(sample, counts, weighted).sum())
        for kind, total in by_part.items():
            assert total == pytest.approx(counted[kind] / 4, rel=1e-6)


def test_a_span_counts_as_absent_only_where_its_kind_was_in_the_batch():
    metrics = SpanMetrics(WEIGHED.spans)
    text = rows(["text"], 0)
    counts = span_counts(text, WEIGHED.spans)
    reduced = metrics.reduce(counts, weighted=WEIGHED.of_batch(counts, {"text": 1}))
    assert {name: reduced[f"absent/{name}"] for name in WEIGHED.spans.names} == {
        "reasoning": 0,
        "final": 0,
        "text": 0,
    }
    final_only = {"loss_mask": torch.ones(1, S), "span_id": torch.full((1, S), 2)}
    counts = span_counts([final_only], WEIGHED.spans)
    reduced = metrics.reduce(counts, weighted=WEIGHED.of_batch(counts, {"conversations": 1}))
    assert [reduced[f"absent/{name}"] for name in WEIGHED.spans.names] == [1, 0, 0]


def test_a_batch_without_anything_supervised_is_refused_naming_the_spans():
    counts = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(LossError, match=r"no token to train on .*reasoning: 0.*text: 0"):
        POOLED.of_batch(counts, {"text": 2})


def test_parts_that_cannot_be_told_apart_are_refused():
    with pytest.raises(LossError, match="share a name"):
        Mixture((Part("text", SpanWeights.text()), Part("text", SpanWeights.conversations())))
    with pytest.raises(LossError, match="share an id"):
        Mixture((Part("text", SpanWeights.text()), Part("more", SpanWeights.text())))
    with pytest.raises(LossError, match=r"samples of \['images'\]"):
        POOLED.of_batch(torch.tensor([1, 1, 1]), {"images": 1})
