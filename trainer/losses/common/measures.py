"""Further numbers of tokens beside their losses, as means over the spans of a global batch."""

from collections.abc import Mapping, Sequence
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.losses.common.spans import Batch, SpanMetrics, SpanWeights


class SpanMeasures:
    """Means of named values of tokens over spans, gathered over micro-batches and reduced once."""

    def __init__(self, spans: SpanWeights, names: Sequence[str]) -> None:
        """Start at zero.

        Args:
            spans: The spans to measure.
            names: What is measured.
        """
        self._spans, self._names = spans, tuple(names)
        self._sums: Tensor | None = None

    def add(self, batch: Batch, values: Mapping[str, Tensor]) -> None:
        """Add the values of a micro-batch.

        Args:
            batch: With `loss_mask` and `span_id` [...].
            values: By name, for each of the names one detached value a token, in the order of the batch's.
        """
        supervised = batch["loss_mask"] > 0
        inside = torch.stack([supervised & (batch["span_id"] == span.id) for span in self._spans.spans])
        flat = torch.stack([values[name].reshape(-1).double() for name in self._names])
        # Not a product of matrices: what stands outside a span may be anything, NaN too.
        kept = torch.where(inside.flatten(1).unsqueeze(0), flat.unsqueeze(1), 0.0)
        sums = kept.sum(dim=2)
        self._sums = sums if self._sums is None else self._sums + sums

    def reduce(
        self, counts: Mapping[str, int], group: dist.ProcessGroup | None, device: torch.device
    ) -> dict[str, float]:
        """Close the step: sum over ranks and start again at zero; collective over the group.

        Args:
            counts: Tokens of each span in the global batch, by name.
            group: Data-parallel group to sum over.
            device: Of the batches.

        Returns:
            `<name>/<span>`, the mean over the span's tokens; left out where the span is absent.
        """
        sums = torch.zeros(len(self._names), len(self._spans.spans), dtype=torch.float64, device=device)
        if self._sums is not None:  # or none of this rank's micro-batches had anything to measure
            sums, self._sums = self._sums, None
        if group is not None and group.size() > 1:
            dist.all_reduce(sums, group=group)
        return {
            f"{name}/{span.name}": total / counts[span.name]
            for name, row in zip(self._names, sums.tolist(), strict=True)
            for span, total in zip(self._spans.spans, row, strict=True)
            if counts[span.name]
        }


class Measured(Protocol):
    """An objective that logs more than its losses.

    Attributes:
        measured: Where token losses are summed.
        measures: Where further values are.
    """

    measured: SpanMetrics
    measures: SpanMeasures


class MeasuredBatch[M: Measured]:
    """One global batch with the weights of its spans, and what is logged of it.

    Args:
        objective: The objective.
        counts: Tokens of each span that are trained on, over all ranks.
        weighted: The spans with their weights in this batch.
        group: The data-parallel ranks.
    """

    def __init__(
        self,
        objective: M,
        counts: Tensor,
        weighted: SpanWeights,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.objective = objective
        self.measured, self.measures = objective.measured, objective.measures
        self.counts, self.weighted, self.group = counts, weighted, group

    def metrics(self) -> dict[str, float | int]:
        """Return those of `SpanMetrics`, and the means of `SpanMeasures`; collective."""
        counted = dict(zip(self.weighted.names, self.counts.tolist(), strict=True))
        return {
            **self.measured.reduce(self.counts, self.group, weighted=self.weighted),
            **self.measures.reduce(counted, self.group, self.counts.device),
        }
