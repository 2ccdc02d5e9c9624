"""What the objectives on scored conversations share: their fields in a batch, and weights by the teacher.

A batch that holds scored tokens has, label-aligned like `loss_mask`, what the top-K store keeps of each:
`teacher_label_logprob` `[B, S]`, and for a divergence `teacher_ids` and `teacher_logprobs` `[B, S, K]`,
`teacher_tail` `[B, S]` and `teacher_draws` `[B, S, M]`. Other tokens have fillers there, which nothing reads.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from trainer.contract.kinds import SCORED
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.distillation import Rescored, ScoredData
from trainer.contract.schema.training import TrainRecipe
from trainer.errors import LossError
from trainer.losses.common.mixture import Mixture
from trainer.losses.common.spans import Batch, SpanWeights

LABEL = "teacher_label_logprob"
"""Log-probability that the teacher gives the token that stands there."""
LEAST_MASS = 1e-8
"""Floor of the mass beyond the kept ids inside a logarithm, of the specification."""


def require_scored(recipe: TrainRecipe) -> ScoredData:
    """Return the recipe's table of scored conversations.

    Raises:
        ConfigError: It has none.
    """
    if recipe.scored is None:
        raise ConfigError(
            f"recipe.scored: missing, and recipe.objective = {recipe.objective!r} learns from scored "
            "conversations; add the table, or take objective = 'span_ce'"
        )
    return recipe.scored


def spans_of(mixture: Mixture, kind: str) -> SpanWeights:
    """Return the spans of one kind of samples of a mixture."""
    return next(part.spans for part in mixture.parts if part.name == kind)


def tokens_of(batch: Batch, spans: SpanWeights) -> Tensor:
    """Return which tokens of a batch are supervised and of these spans, bool of the shape of `span_id`."""
    return (batch["loss_mask"] > 0) & torch.isin(
        batch["span_id"], torch.tensor([span.id for span in spans.spans], device=batch["span_id"].device)
    )


def require_fields(
    batches: Sequence[Batch], spans: SpanWeights, fields: Mapping[str, int | None], source: str
) -> None:
    """Refuse micro-batches that hold tokens of these spans without what a teacher says of them.

    Args:
        batches: This rank's micro-batches.
        spans: The spans.
        fields: Needed fields; where a number is given, the width of the last dimension.
        source: What brings the fields, for the message.

    Raises:
        LossError: A field is missing, or has another shape.
    """
    for batch in batches:
        shape = tuple(batch["span_id"].shape)
        for name, width in fields.items():
            if name not in batch:
                if bool(tokens_of(batch, spans).any()):
                    raise LossError(
                        f"the batch has tokens of {', '.join(spans.names)} and no {name}, only "
                        f"{sorted(batch)}; {source} must bring it"
                    )
            elif tuple(batch[name].shape) != (wanted := shape if width is None else (*shape, width)):
                raise LossError(
                    f"{name} has shape {list(batch[name].shape)}, expected {list(wanted)} of {source}; is "
                    "this the one that the recipe is meant for?"
                )


class Rescoring:
    """Weights of the cross-entropy of scored tokens: `clip(exp((lp - m_s) / tau), w_min, w_max)`.

    `lp` is the teacher's log-probability of the token that stands there and `m_s` its mean over the stored
    training tokens of the token's span, frozen in the store's manifest: the weights depend neither on the
    order of the samples nor on where a run was resumed. They carry no gradient.

    Args:
        terms: The recipe's `kd.rescored`.
        spans: The spans of scored tokens.
    """

    def __init__(self, terms: Rescored, spans: SpanWeights) -> None:
        self._terms, self._spans = terms, spans
        self._means: dict[int, float] | None = None

    def take_means(self, manifest: Mapping[str, Any]) -> None:
        """Take `m_s` from a store's manifest.

        Raises:
            LossError: It has none for a span.
        """
        means = manifest.get("span_means", {})
        found = {span.id: means.get(span.name.removeprefix(f"{SCORED}_")) for span in self._spans.spans}
        if missing := [span.name for span in self._spans.spans if found[span.id] is None]:
            raise LossError(
                f"kd.rescored needs the teacher's mean log-probability over {', '.join(missing)}, and the "
                f"top-K store's span_means are {dict(means)}; score training conversations that have these "
                "spans, or leave kd.rescored out"
            )
        self._means = {number: float(mean) for number, mean in found.items() if mean is not None}

    def require_means(self) -> None:
        """Refuse to go on before `take_means`.

        Raises:
            LossError: It was not called.
        """
        if self._means is None:
            raise LossError(
                "kd.rescored needs the span_means of the top-K store's manifest before the first step; open "
                "the store, and hand its manifest to the objective's use_store"
            )

    def weights(self, batch: Batch) -> Tensor:
        """Return the weight of each token `[B, S]` float32; 1 where it is not scored.

        Raises:
            LossError: The means are not known yet.
        """
        self.require_means()
        weights = torch.ones(batch["span_id"].shape, dtype=torch.float32, device=batch["span_id"].device)
        if LABEL not in batch:
            return weights
        for number, mean in (self._means or {}).items():
            raised = ((batch[LABEL].float() - mean) / self._terms.tau).exp()
            inside = (batch["loss_mask"] > 0) & (batch["span_id"] == number)
            weights = torch.where(inside, raised.clamp(self._terms.w_min, self._terms.w_max), weights)
        return weights
