"""Cross-entropy of scored conversations, each token weighed by what the teacher thinks of it.

`L_s = 1 / N_s * sum_t w_t ce_t` over each span s of the scored conversations, with the weights of
`common.scored.Rescoring`; divided by the number of tokens, not by the sum of the weights. The other
conversations of the mixture have plain cross-entropy.

Logged of scored spans s beside the loss: `ce/s`, the cross-entropy without weights, and `rescoring/s`, their
mean.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Self

import torch.distributed as dist
from torch import Tensor

from trainer.contract.kinds import SCORED
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.training import TrainRecipe
from trainer.losses.common.measures import MeasuredBatch, SpanMeasures
from trainer.losses.common.mixture import Mixture
from trainer.losses.common.objective import Head, Objective
from trainer.losses.common.parts import mixture_of
from trainer.losses.common.scored import LABEL, Rescoring, require_fields, require_scored, spans_of
from trainer.losses.common.spans import Batch, SpanMetrics, span_counts, token_weights


class RescoredCrossEntropy(Objective):
    """Cross-entropy by span, weighed by the teacher on scored conversations.

    Args:
        mixture: The kinds, with the weights of their spans.
        rescoring: The weights of scored tokens.
    """

    def __init__(self, mixture: Mixture, rescoring: Rescoring) -> None:
        self.mixture, self.rescoring = mixture, rescoring
        self.scored = spans_of(mixture, SCORED)
        self.measured = SpanMetrics(mixture.spans)
        self.measures = SpanMeasures(self.scored, ("ce", "rescoring"))
        self.absent = self.measured.absent

    @classmethod
    def refuse(cls, recipe: TrainRecipe) -> None:
        """Refuse a recipe without scores, without the weights' terms, or with those of a divergence."""
        require_scored(recipe)
        if recipe.kd is None or recipe.kd.rescored is None:
            raise ConfigError(
                "recipe.kd.rescored: missing, and recipe.objective = 'rescored_ce' weighs by it; give "
                "rescored = { tau = 1.0, w_min = 0.25, w_max = 4.0 }, or take objective = 'span_ce'"
            )
        for key in ("kl_weight", "target"):
            if (value := getattr(recipe.kd, key)) is not None:
                raise ConfigError(
                    f"recipe.kd.{key} = {value!r}, and recipe.objective = 'rescored_ce' has no divergence; "
                    "leave it out, or take objective = 'topk_kl'"
                )

    @classmethod
    def of(cls, recipe: TrainRecipe, kinds: Iterable[str]) -> Self:
        """Make the objective of a recipe."""
        assert recipe.kd is not None  # refuse
        assert recipe.kd.rescored is not None
        mixture = mixture_of(kinds, recipe.kd)
        return cls(mixture, Rescoring(recipe.kd.rescored, spans_of(mixture, SCORED)))

    def use_store(self, manifest: Mapping[str, Any]) -> None:
        """Take the teacher's mean log-probabilities."""
        self.rescoring.take_means(manifest)

    def start(
        self, batches: Sequence[Batch], samples: Mapping[str, int], group: dist.ProcessGroup | None
    ) -> "GlobalBatch":
        """Count the tokens of each span and give the spans their weights in this batch."""
        self.rescoring.require_means()
        require_fields(batches, self.scored, {LABEL: None}, "the top-K store")
        counts = span_counts(batches, self.mixture.spans, group)
        return GlobalBatch(self, counts, self.mixture.of_batch(counts, samples), group)

    def token_measures(self, head: Head, hidden: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Cross-entropy as it is, and as the objective weighs it."""
        ce = self.token_losses(head, hidden, batch)
        return {"loss": ce, "objective": ce * self.rescoring.weights(batch)}


class GlobalBatch(MeasuredBatch[RescoredCrossEntropy]):
    """One global batch of rescored cross-entropy."""

    def loss(self, head: Head, hidden: Tensor, batch: Batch) -> Tensor:
        """Sum of the micro-batch's cross-entropies, by the weights of spans and teacher."""
        rescoring = self.objective.rescoring.weights(batch)
        weights = token_weights(batch, self.counts, self.weighted) * rescoring
        loss, ce = head.cross_entropy(hidden, batch["labels"], weights, batch["loss_mask"] > 0)
        self.measured.add(batch, ce * rescoring)
        self.measures.add(batch, {"ce": ce, "rescoring": rescoring})
        return loss


OBJECTIVE = RescoredCrossEntropy
