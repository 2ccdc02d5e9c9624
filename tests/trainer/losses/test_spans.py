"""The span-normalised loss: one gradient however the global batch is cut."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.errors import LossError
from trainer.losses.common.spans import (
    Span,
    SpanMetrics,
    SpanWeights,
    absent_spans,
    span_counts,
    token_weights,
)
from trainer.model.cross_entropy import chunked_cross_entropy

S, H, V = 12, 6, 19
OBJECTIVE = SpanWeights.conversations(reasoning=0.7, final=1.9)


def make_batch(spans):
    """A batch [B, S] whose mask is where the span is set."""
    span_id = torch.tensor(spans)
    return {"loss_mask": (span_id > 0).float(), "span_id": span_id}


def random_rows(rows, seed):
    generator = torch.Generator().manual_seed(seed)
    span_id = torch.randint(0, 3, (rows, S), generator=generator)
    return [
        {
            "loss_mask": (span_id[row : row + 1] > 0).float(),
            "span_id": span_id[row : row + 1],
            "labels": torch.randint(V, (1, S), generator=generator),
            "features": torch.randn(1, S, H, generator=generator, dtype=torch.float64),
        }
        for row in range(rows)
    ]


def model(seed=3):
    generator = torch.Generator().manual_seed(seed)
    body = torch.randn(H, H, generator=generator, dtype=torch.float64).requires_grad_()
    head = torch.randn(V, H, generator=generator, dtype=torch.float64).requires_grad_()
    return body, head


def join(rows):
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def train_step(micro_batches, counts, objective=OBJECTIVE):
    """Summed gradients of one step on a two-matrix model, and the logged metrics."""
    body, head = model()
    metrics = SpanMetrics(objective)
    for batch in micro_batches:
        hidden = torch.tanh(batch["features"] @ body).reshape(-1, H)
        weights = token_weights(batch, counts, objective).reshape(-1)
        loss, ce = chunked_cross_entropy(
            hidden, head, batch["labels"].reshape(-1), weights.double(), chunk_tokens=5
        )
        loss.backward()
        metrics.add(batch, ce)
    return (body.grad, head.grad), metrics.reduce(counts)


def direct(rows, objective=OBJECTIVE):
    """The definition: a weighted sum of two means over everything at once, by token loops."""
    body, head = model()
    sums, counts = dict.fromkeys((1, 2), 0.0), dict.fromkeys((1, 2), 0)
    for row in rows:
        log_probs = torch.log_softmax(torch.tanh(row["features"][0] @ body) @ head.T, dim=-1)
        for t in range(S):
            span = int(row["span_id"][0, t])
            if span:
                sums[span] = sums[span] - log_probs[t, row["labels"][0, t]]
                counts[span] += 1
    loss = sum(span.weight * sums[span.id] / counts[span.id] for span in objective.spans if counts[span.id])
    loss.backward()
    return (
        (body.grad, head.grad),
        loss.item(),
        {s: float(v.detach()) for s, v in sums.items() if counts[s]},
        counts,
    )


def test_one_step_equals_the_definition():
    rows = random_rows(4, seed=0)
    counts = span_counts(rows, OBJECTIVE)
    grads, metrics = train_step(rows, counts)
    expected, loss, sums, expected_counts = direct(rows)
    assert counts.tolist() == list(expected_counts.values())
    assert metrics["loss"] == pytest.approx(loss)
    assert metrics["loss/reasoning"] == pytest.approx(sums[1] / expected_counts[1])
    assert metrics["loss/final"] == pytest.approx(sums[2] / expected_counts[2])
    assert [metrics["tokens/reasoning"], metrics["tokens/final"]] == list(expected_counts.values())
    assert (metrics["weight/reasoning"], metrics["weight/final"]) == (0.7, 1.9)
    for found, wanted in zip(grads, expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-8)  # token weights are float32


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), cuts=st.sets(st.integers(1, 5)), ranks=st.integers(1, 3))
def test_gradient_does_not_depend_on_the_split(seed, cuts, ranks):
    rows = random_rows(6, seed)
    edges = [0, *sorted(cuts), 6]
    micro_batches = [join(rows[a:b]) for a, b in itertools.pairwise(edges)]
    reference, reference_metrics = train_step([join(rows)], span_counts([join(rows)], OBJECTIVE))

    # Each "rank" counts and back-propagates its own micro-batches; sums stand for the all-reduces.
    shares = [share for rank in range(ranks) if (share := micro_batches[rank::ranks])]
    counts = sum(span_counts(share, OBJECTIVE) for share in shares)
    parts = [train_step(share, counts) for share in shares]
    for place, wanted in enumerate(reference):
        torch.testing.assert_close(sum(grads[place] for grads, _ in parts), wanted)
    assert sum(metrics["loss"] for _, metrics in parts) == pytest.approx(reference_metrics["loss"])


def micro_batch_average(batches, losses, objective):
    """Span means inside each micro-batch, averaged over micro-batches: the reduction not used here."""
    total = 0.0
    for batch, ce in zip(batches, losses, strict=True):
        for span in objective.spans:
            inside = (batch["loss_mask"] > 0) & (batch["span_id"] == span.id)
            total = total + span.weight * (ce * inside).sum() / inside.sum().clamp(min=1)
    return total / len(batches)


def test_micro_batch_average_depends_on_the_split_and_this_loss_does_not():
    """Two rows, three reasoning tokens in one and one in the other; numbers worked out by hand."""
    rows = [make_batch([[1, 1, 1, 2]]), make_batch([[1, 0, 0, 0]])]
    losses = [torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.tensor([[8.0, 9.0, 9.0, 9.0]])]
    objective = SpanWeights.conversations()

    apart = micro_batch_average(rows, losses, objective)
    together = micro_batch_average([join(rows)], [torch.cat(losses)], objective)
    assert apart.item() == pytest.approx(
        ((2.0 + 4.0) + (8.0 + 0.0)) / 2
    )  # the absent span counts as a loss of 0
    assert together.item() == pytest.approx(14.0 / 4 + 4.0)

    for split, values in ((rows, losses), ([join(rows)], [torch.cat(losses)])):
        counts = span_counts(split, objective)
        total = sum(
            (token_weights(batch, counts, objective) * ce).sum()
            for batch, ce in zip(split, values, strict=True)
        )
        assert total.item() == pytest.approx(14.0 / 4 + 4.0)


def test_absent_span_is_a_zero_term_and_leaves_the_other_weight_alone():
    rows = random_rows(3, seed=1)
    for row in rows:
        row["span_id"][row["span_id"] == 1] = 0
        row["loss_mask"] = (row["span_id"] > 0).float()
    counts = span_counts(rows, OBJECTIVE)
    assert absent_spans(counts, OBJECTIVE) == ["reasoning"]
    grads, metrics = train_step(rows, counts)
    expected, loss, _, _ = direct(rows)
    assert metrics["loss"] == pytest.approx(loss) == pytest.approx(1.9 * metrics["loss/final"])
    assert "loss/reasoning" not in metrics  # no mean of nothing: 0 would read as a perfect score
    assert (metrics["weight/reasoning"], metrics["absent/reasoning"], metrics["absent/final"]) == (0.0, 1, 0)
    torch.testing.assert_close(grads[0], expected[0], rtol=1e-6, atol=1e-8)


def test_absent_batches_are_counted_over_steps():
    metrics = SpanMetrics(OBJECTIVE)
    for spans, absent in (([[1, 2]], 0), ([[1, 0]], 1), ([[2, 1]], 1), ([[1, 1]], 2)):
        batch = make_batch(spans)
        metrics.add(batch, torch.ones(1, 2))
        assert metrics.reduce(span_counts([batch], OBJECTIVE))["absent/final"] == absent


def test_batch_without_any_supervised_token_fails_the_step():
    counts = span_counts([make_batch([[0, 0, 0]])], OBJECTIVE)
    with pytest.raises(LossError, match="no token to train on"):
        absent_spans(counts, OBJECTIVE)


def test_batch_with_tokens_of_weight_zero_only_fails_the_step():
    objective = SpanWeights.conversations(reasoning=0.0, final=1.0)
    with pytest.raises(LossError, match=r"no token to train on.*reasoning: 2 tokens of weight 0\.0"):
        absent_spans(span_counts([make_batch([[1, 1]])], objective), objective)


def test_span_of_weight_zero_is_measured_and_not_trained_on():
    objective = SpanWeights.conversations(reasoning=0.0, final=1.0)
    batch = make_batch([[1, 2]])
    counts = span_counts([batch], objective)
    assert token_weights(batch, counts, objective).tolist() == [[0.0, 1.0]]
    metrics = SpanMetrics(objective)
    metrics.add(batch, torch.tensor([[5.0, 3.0]]))
    logged = metrics.reduce(counts)
    assert (logged["loss/reasoning"], logged["loss"]) == (5.0, 3.0)


@pytest.mark.parametrize("weight", [-0.1, -math.inf, math.nan, math.inf])
def test_weights_that_are_not_finite_and_positive_are_refused(weight):
    with pytest.raises(LossError, match="weight of span final"):
        SpanWeights.conversations(final=weight)


def test_all_weights_zero_is_refused():
    with pytest.raises(LossError, match="nothing to train on"):
        SpanWeights.conversations(0.0, 0.0)


def test_ids_must_differ():
    with pytest.raises(LossError, match="share an id"):
        SpanWeights((Span("a", 1, 1.0), Span("b", 1, 1.0)))


@pytest.mark.parametrize("missing", ["span_id", "loss_mask"])
def test_missing_field_is_named(missing):
    batch = make_batch([[1, 2]])
    del batch[missing]
    with pytest.raises(LossError, match=f"no {missing}"):
        span_counts([batch], OBJECTIVE)


def test_supervised_token_outside_the_objective_is_refused():
    """Text under the conversation objective would otherwise train on nothing, silently."""
    with pytest.raises(LossError, match="2 of 3 supervised tokens belong to no span"):
        span_counts([make_batch([[3, 3, 1]])], OBJECTIVE)
    batch = make_batch([[1, 2]])
    batch["span_id"][0, 0] = 0
    with pytest.raises(LossError, match="1 of 2"):
        span_counts([batch], OBJECTIVE)


def test_text_is_the_plain_mean():
    batch = make_batch([[3, 0, 3, 3]])
    objective = SpanWeights.text()
    counts = span_counts([batch], objective)
    ce = torch.tensor([[1.0, 50.0, 2.0, 6.0]])
    assert (token_weights(batch, counts, objective) * ce).sum().item() == pytest.approx(3.0)


def test_counting_nothing_is_refused():
    with pytest.raises(LossError, match="no micro-batch"):
        span_counts([], OBJECTIVE)
