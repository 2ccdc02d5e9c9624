"""Cross-entropy by span: the objective of healing runs and of stage 1.

Conversations weigh the mean over their reasoning and the mean over their final answers by the recipe's `kd`
table; without that table all their supervised tokens are one pool. Text is one span. `common.spans` has the
formula inside a kind of samples, `common.mixture` the one across kinds.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Self

import torch.distributed as dist
from torch import Tensor

from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.training import TrainRecipe
from trainer.losses.common.mixture import Mixture
from trainer.losses.common.objective import Head, Objective
from trainer.losses.common.parts import mixture_of
from trainer.losses.common.spans import Batch, SpanMetrics, SpanWeights, span_counts, token_weights


class SpanCrossEntropy(Objective):
    """Span-normalised cross-entropy over the kinds of samples that a run mixes.

    Args:
        mixture: The kinds, with the weights of their spans.
    """

    def __init__(self, mixture: Mixture) -> None:
        self.mixture = mixture
        self.measured = SpanMetrics(mixture.spans)
        self.absent = self.measured.absent

    @classmethod
    def refuse(cls, recipe: TrainRecipe) -> None:
        """Refuse weights of spans that are not mixed in, and what only other objectives use."""
        for key, word in (("scored", "topk_kl"), ("rollouts", "opd")):
            if getattr(recipe, key) is not None:
                raise ConfigError(
                    f"recipe.{key}: given, and recipe.objective = 'span_ce' uses no teacher; leave it out, "
                    f"or take objective = {word!r}"
                )
        if recipe.kd is not None and recipe.harmony_fraction == 0:
            raise ConfigError(
                "recipe.kd weighs the spans of conversations, and recipe.harmony_fraction = 0 mixes none in; "
                "leave kd out, or raise harmony_fraction"
            )

    @classmethod
    def of(cls, recipe: TrainRecipe, kinds: Iterable[str]) -> Self:
        """Make the objective of a recipe."""
        return cls(mixture_of(kinds, recipe.kd))

    def start(
        self, batches: Sequence[Batch], samples: Mapping[str, int], group: dist.ProcessGroup | None
    ) -> "GlobalBatch":
        """Count the tokens of each span and give the spans their weights in this batch."""
        counts = span_counts(batches, self.mixture.spans, group)
        return GlobalBatch(self.measured, counts, self.mixture.of_batch(counts, samples), group)


class GlobalBatch:
    """One global batch, with the weights of its spans.

    Args:
        measured: Where its token losses are summed.
        counts: Tokens of each span, over all ranks.
        weighted: The spans with their weights in this batch.
        group: The data-parallel ranks.
    """

    def __init__(
        self,
        measured: SpanMetrics,
        counts: Tensor,
        weighted: SpanWeights,
        group: dist.ProcessGroup | None,
    ) -> None:
        self.measured, self.counts, self.weighted, self.group = measured, counts, weighted, group

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum of the micro-batch's token losses, each by the weight of its span over the span's tokens."""
        weights = token_weights(batch, self.counts, self.weighted)
        loss, each = head.cross_entropy(hidden, batch["labels"], weights, batch["loss_mask"] > 0)
        self.measured.add(batch, each)
        return loss

    def metrics(self) -> dict[str, float | int]:
        """Objective, and loss, tokens, weight and absences of each span; see `SpanMetrics.reduce`."""
        return self.measured.reduce(self.counts, self.group, weighted=self.weighted)


OBJECTIVE = SpanCrossEntropy
