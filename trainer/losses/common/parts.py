"""The parts of a mixture, by the recipe's `kd` table."""

from collections.abc import Iterable

from trainer.contract.kinds import CONVERSATIONS, ROLLOUTS, SCORED, TEXT
from trainer.contract.schema.distillation import KDConfig
from trainer.losses.common.mixture import Mixture, Part
from trainer.losses.common.spans import SpanWeights


def mixture_of(kinds: Iterable[str], kd: KDConfig | None) -> Mixture:
    """Return the parts of these kinds of samples.

    Args:
        kinds: Of `trainer.contract.kinds`.
        kd: Weights of the reasoning and the final span of each kind of conversations; None makes all
            supervised tokens of such a kind one pool.
    """
    pooled = kd is None
    weights = (1.0, 1.0) if kd is None else (kd.span_weight_reasoning, kd.span_weight_final)
    spans = {
        CONVERSATIONS: SpanWeights.conversations,
        SCORED: SpanWeights.scored,
        ROLLOUTS: SpanWeights.rollouts,
    }
    return Mixture(
        tuple(
            Part(TEXT, SpanWeights.text()) if kind == TEXT else Part(kind, spans[kind](*weights), pooled)
            for kind in kinds
        )
    )
