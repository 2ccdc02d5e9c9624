"""How much each kind of samples counts in a global batch, such as plain text and conversations.

With n samples in the global batch, n_p of them of part p::

    L = sum_p (n_p / n) * L_p

    text:           L_p = mean(ce)                   over the part's supervised tokens
    conversations:  L_p = sum_s w_s * mean_s(ce)     over the spans s, weights w_s of the recipe's kd table
                    L_p = mean(ce)                   over reasoning and final together, without that table

A part counts by its samples, so over a run its weight is the share that the recipe asks for, however long its
texts are or how much of them is supervised; inside a part every token counts as it would in a batch of that
part alone. A batch of one part has exactly that part's loss. (Span weights that add up to 2, as the default
1 and 1 do, give a conversation twice the weight of a text; halve them for even weights.)

All means are over the global batch: n and n_p are known from the sampler, the token counts N_s from the
masks, both before the first forward pass. Every micro-batch back-propagates the sum over its tokens of
`weight_s / N_s * ce`, with `weight_s` from below, and these are summed over micro-batches and ranks. The
gradient therefore does not depend on which samples share a micro-batch or a rank.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from torch import Tensor

from trainer.errors import LossError
from trainer.losses.common.spans import SpanWeights, absent_spans


@dataclass(frozen=True)
class Part:
    """The loss of one kind of samples.

    Attributes:
        name: The kind.
        spans: Its spans; their weights are relative to the part's share of the batch.
        pooled: The mean over all supervised tokens of the part, instead of a weighted sum of span means.
    """

    name: str
    spans: SpanWeights
    pooled: bool = False


@dataclass(frozen=True)
class Mixture:
    """The losses of all kinds of samples that a run may see."""

    parts: tuple[Part, ...]

    def __post_init__(self) -> None:
        if not self.parts:
            raise LossError("an objective without parts: there is nothing to train on")
        if len({part.name for part in self.parts}) < len(self.parts):
            raise LossError(f"parts share a name: {[part.name for part in self.parts]}")
        _ = self.spans  # refuses spans that share an id

    @property
    def spans(self) -> SpanWeights:
        """The spans of all parts, in the order of all count and sum vectors."""
        return SpanWeights(tuple(span for part in self.parts for span in part.spans.spans))

    def of_batch(self, counts: Tensor, samples: Mapping[str, float]) -> SpanWeights:
        """Return the same spans with their weights in one global batch.

        The weight of span s of part p is `n_p / n * w_s`, or `n_p / n * N_s / N_p` where the part is
        pooled.

        Args:
            counts: `N_s` of the global batch, of `span_counts` over `spans`.
            samples: Samples of each part in the global batch, or their shares; a part that is left out has
                none.

        Raises:
            LossError: A sample is of no known part, or no token of the batch carries a weight.
        """
        if unknown := sorted(set(samples) - {part.name for part in self.parts}):
            raise LossError(f"the batch has samples of {unknown}, the objective is for {self.names}")
        absent_spans(counts, self.spans)  # refuses a batch without anything to train on
        total = sum(samples.values())
        tokens = dict(zip(self.spans.names, counts.tolist(), strict=True))
        weighted = []
        for part in self.parts:
            share = samples.get(part.name, 0) / total if total else 0.0
            supervised = sum(tokens[name] for name in part.spans.names)
            for span in part.spans.spans:
                inside = tokens[span.name] / max(supervised, 1) if part.pooled else span.weight
                weighted.append(replace(span, weight=share * inside))
        return SpanWeights(tuple(weighted))

    def value(self, means: Sequence[float], counts: Tensor, samples: Mapping[str, float]) -> float:
        """Return the loss of a global batch of which the mean of each span is known.

        Args:
            means: Mean token loss of each span.
            counts: Tokens of each.
            samples: Samples of each part, or their shares.

        Raises:
            LossError: A sample is of no known part, or no token carries a weight.
        """
        weighted = self.of_batch(counts, samples).spans
        return sum(span.weight * mean for span, mean in zip(weighted, means, strict=True))

    @property
    def names(self) -> list[str]:
        """Part names."""
        return [part.name for part in self.parts]
