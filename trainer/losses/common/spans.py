"""Span normalisation: `L = sum_s w_s * mean_s(ce)` over the spans s of the global batch.

The means are global. The counts `N_s` depend on masks alone, so they are summed over all micro-batches and
ranks before the first forward pass (one small all-reduce a step), and every micro-batch then back-propagates
`sum_s w_s / N_s * sum(ce in s)`, to be summed over micro-batches and ranks. The gradient is that of the
global batch, however it is split. Means taken inside each micro-batch and averaged would instead weigh a
token by the company it happens to keep, and count a micro-batch that lacks a span as a loss of 0 for it.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import LossError

Batch = Mapping[str, Tensor]


@dataclass(frozen=True)
class Span:
    """One term of the objective.

    Attributes:
        name: Its name in logs.
        id: Its value in `span_id`, above 0.
        weight: `w_s`, at least 0.
    """

    name: str
    id: int
    weight: float


@dataclass(frozen=True)
class SpanWeights:
    """The spans that a run trains on, with their weights.

    Every supervised token must belong to one of them. A span of weight 0 is measured and not trained on.
    """

    spans: tuple[Span, ...]

    def __post_init__(self) -> None:
        for span in self.spans:
            if not span.weight >= 0 or span.weight == float("inf"):
                raise LossError(
                    f"weight of span {span.name} is {span.weight}; it must be finite and at least 0"
                )
            if span.id < 1:
                raise LossError(f"span {span.name} has id {span.id}; ids start at 1, 0 means unsupervised")
        if len({span.id for span in self.spans}) < len(self.spans):
            raise LossError(f"spans share an id: {[(span.name, span.id) for span in self.spans]}")
        if not any(span.weight > 0 for span in self.spans):
            raise LossError("all span weights are 0: there is nothing to train on")

    @classmethod
    def conversations(cls, reasoning: float = 1.0, final: float = 1.0) -> "SpanWeights":
        """Reasoning and final answer, ids 1 and 2.

        Args:
            reasoning: `kd.span_weight_reasoning`.
            final: `kd.span_weight_final`.

        Raises:
            LossError: If a weight is negative or not finite, or both are 0.
        """
        return cls((Span("reasoning", 1, reasoning), Span("final", 2, final)))

    @classmethod
    def scored(cls, reasoning: float = 1.0, final: float = 1.0) -> "SpanWeights":
        """Reasoning and final answer of conversations that a teacher has scored, ids 4 and 5."""
        return cls((Span("scored_reasoning", 4, reasoning), Span("scored_final", 5, final)))

    @classmethod
    def rollouts(cls, reasoning: float = 1.0, final: float = 1.0) -> "SpanWeights":
        """Reasoning and final answer of conversations that the student wrote, ids 6 and 7."""
        return cls((Span("rollout_reasoning", 6, reasoning), Span("rollout_final", 7, final)))

    @classmethod
    def text(cls) -> "SpanWeights":
        """Plain text as one span, id 3: the mean cross-entropy over its tokens."""
        return cls((Span("text", 3, 1.0),))

    @property
    def names(self) -> list[str]:
        """Span names, in the order of all count and sum vectors."""
        return [span.name for span in self.spans]


def span_counts(
    batches: Iterable[Batch], spans: SpanWeights, group: dist.ProcessGroup | None = None
) -> Tensor:
    """Count the supervised tokens of each span in a global batch. Call it before the first forward pass.

    Args:
        batches: This rank's micro-batches, each with `loss_mask` and `span_id` of one shape.
        spans: The spans to count.
        group: Data-parallel group to sum over.

    Returns:
        `N_s` [spans] int64 (for conversations: `N_reasoning, N_final`), on the device of the batches.

    Raises:
        LossError: If a batch has no `span_id` or `loss_mask`, has none of the micro-batches, or
            supervises a token of another span.
    """
    totals = []
    for batch in batches:
        selected, span_id = _supervised(batch)
        counts = torch.stack([(selected & (span_id == span.id)).sum() for span in spans.spans])
        totals.append(torch.cat((counts, selected.sum().unsqueeze(0))))
    if not totals:
        raise LossError("no micro-batch to count spans in")
    total = torch.stack(totals).sum(dim=0)
    if group is not None and group.size() > 1:
        dist.all_reduce(total, group=group)
    # After the all-reduce, so that all ranks fail together instead of one leaving the others waiting.
    if int(total[:-1].sum()) != int(total[-1]):
        raise LossError(
            f"{int(total[-1] - total[:-1].sum())} of {int(total[-1])} supervised tokens belong to no span of"
            f" the objective {[(span.name, span.id) for span in spans.spans]}; is this the data set it is"
            " meant for?"
        )
    return total[:-1]


def absent_spans(counts: Tensor, spans: SpanWeights) -> list[str]:
    """Names of the spans that a global batch lacks. Their terms are 0, the other weights stay as they are.

    Args:
        counts: Of `span_counts`.
        spans: The same spans.

    Raises:
        LossError: If no token of the batch carries a weight: the step would train on nothing.
    """
    found = counts.tolist()
    if not any(count and span.weight > 0 for count, span in zip(found, spans.spans, strict=True)):
        listed = ", ".join(
            f"{span.name}: {count} tokens of weight {span.weight}"
            for count, span in zip(found, spans.spans, strict=True)
        )
        raise LossError(
            f"the global batch has no token to train on ({listed}); check the data set's loss masks"
        )
    return [span.name for count, span in zip(found, spans.spans, strict=True) if count == 0]


def token_weights(batch: Batch, counts: Tensor, spans: SpanWeights) -> Tensor:
    """Weight `w_s / N_s` of each supervised token of a micro-batch, 0 elsewhere.

    Args:
        batch: Micro-batch with `loss_mask` and `span_id` [...].
        counts: `N_s` of the global batch.
        spans: The same spans.

    Returns:
        Weights of the shape of the mask, float32.

    Raises:
        LossError: If the batch lacks a field.
    """
    selected, span_id = _supervised(batch)
    weights = torch.zeros(selected.shape, dtype=torch.float32, device=selected.device)
    scale = torch.tensor([span.weight for span in spans.spans], dtype=torch.float64, device=counts.device)
    each = (scale / counts.clamp(min=1)).to(torch.float32)
    for place, span in enumerate(spans.spans):
        weights = torch.where(selected & (span_id == span.id), each[place], weights)
    return weights


class SpanMetrics:
    """What every step logs of its loss, gathered over micro-batches and reduced once.

    Attributes:
        absent: For each span, in how many global batches of this object's life it was missing; a warning
        counter.
    """

    def __init__(self, spans: SpanWeights):
        """Start at zero.

        Args:
            spans: The spans to measure.
        """
        self._spans = spans
        self._sums: Tensor | None = None
        self.absent: dict[str, int] = dict.fromkeys(spans.names, 0)

    def add(self, batch: Batch, ce: Tensor) -> None:
        """Add the per-token losses of a micro-batch.

        Args:
            batch: Micro-batch with `loss_mask` and `span_id` [...].
            ce: Detached losses of the same number of tokens, in the same order.
        """
        selected, span_id = _supervised(batch)
        flat = ce.reshape(selected.shape).double()
        sums = torch.stack(
            [torch.where(selected & (span_id == span.id), flat, 0.0).sum() for span in self._spans.spans]
        )
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(
        self,
        counts: Tensor,
        group: dist.ProcessGroup | None = None,
        *,
        weighted: SpanWeights | None = None,
    ) -> dict[str, float | int]:
        """Close the step: sum over ranks and start again at zero.

        Args:
            counts: `N_s` of the global batch.
            group: Data-parallel group to sum over.
            weighted: The same spans with the weights of this batch, where those are its own. A span of weight
                0 in it was not to be expected and does not count as absent.

        Returns:
            `loss` (the objective) and for each span s `loss/s` (global mean; left out where the span is
            absent), `tokens/s`, `weight/s` (effective: 0 where absent) and `absent/s` (batches without
            It so far).
        """
        sums = torch.zeros(counts.shape, dtype=torch.float64, device=counts.device)
        if self._sums is not None:
            sums, self._sums = self._sums, None
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
        metrics: dict[str, float | int] = {"loss": 0.0}
        for span, total, count in zip(
            (weighted or self._spans).spans, sums.tolist(), counts.tolist(), strict=True
        ):
            metrics[f"tokens/{span.name}"] = count
            metrics[f"weight/{span.name}"] = span.weight if count else 0.0
            if count:
                metrics[f"loss/{span.name}"] = total / count
                metrics["loss"] += span.weight * total / count
            elif weighted is None or span.weight:
                self.absent[span.name] += 1
            metrics[f"absent/{span.name}"] = self.absent[span.name]
        return metrics


def _supervised(batch: Batch) -> tuple[Tensor, Tensor]:
    """`(loss_mask > 0, span_id)` of a batch."""
    for name in ("loss_mask", "span_id"):
        if name not in batch:
            raise LossError(f"the batch has no {name}, only {sorted(batch)}; the span loss needs it")
    mask, span_id = batch["loss_mask"], batch["span_id"]
    if mask.shape != span_id.shape:
        raise LossError(f"loss_mask {list(mask.shape)} and span_id {list(span_id.shape)} differ in shape")
    return mask > 0, span_id
