"""What a teacher's log-probabilities are stored as, and how a student learns from them."""

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from trainer.contract.rounds import rollout_rows, round_size
from trainer.contract.schema.base import (
    Count,
    Fraction,
    Frozen,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
)

Target = Literal["bucket", "unbiased", "mix"]
Share = Annotated[float, Field(gt=0, le=1)]

DRAWN_TARGETS: tuple[Target, ...] = ("unbiased", "mix")
"""Targets that are made from draws of the teacher's tail."""


class TeacherTopk(Frozen):
    """What is kept of a teacher's distribution at every supervised token of a subset of the conversations.

    Attributes:
        topk: Most likely ids that are kept, with their log-probabilities.
        subset_fraction: Share of the training conversations that is scored; the validation split is whole.
        mass: Keep the fewest ids that reach this probability, `topk` at most; None keeps `topk` everywhere.
        tail_draws: Ids drawn from the rest of the distribution by its probabilities.
        logprob_error: No stored log-probability is off by more.
    """

    topk: PositiveInt
    subset_fraction: Share
    mass: Annotated[float, Field(gt=0, lt=1)] | None = None
    tail_draws: Count = 0
    logprob_error: PositiveFloat = 0.01


class ScoredData(Frozen):
    """Scored conversations as a part of a run's samples.

    Attributes:
        fraction: Share of the samples; the rest are conversations without scores.
        subset_fraction: Share of the training conversations that the store must hold.
        topk: Ids that are stored for a token, at most.
        tail_draws: Draws that are stored for a token.
    """

    fraction: Share
    subset_fraction: Share
    topk: PositiveInt
    tail_draws: Count


class Rescored(Frozen):
    """Weights of tokens by the teacher's log-probability: `clip(exp((lp − m) / tau), w_min, w_max)`.

    `m` is the mean of `lp` over the stored training tokens of the span; the store's manifest has it.
    """

    tau: PositiveFloat = 1.0
    w_min: NonNegativeFloat = 0.25
    w_max: PositiveFloat = 4.0

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.w_min > self.w_max:
            raise ValueError(f"w_min = {self.w_min} is more than w_max = {self.w_max}")
        return self


class KDSpans(Frozen):
    """The distillation loss: weights of the reasoning and final spans."""

    span_weight_reasoning: NonNegativeFloat = 1.0
    span_weight_final: NonNegativeFloat = 1.0

    @model_validator(mode="after")
    def _check_weights(self) -> Self:
        if self.span_weight_reasoning == 0 and self.span_weight_final == 0:
            raise ValueError(
                "span_weight_reasoning and span_weight_final are both 0: nothing would be trained"
            )
        return self


class KDConfig(KDSpans):
    """The same with what scored conversations add; an objective refuses the keys that it would not use.

    Attributes:
        kl_weight: Share of the divergence from the teacher in the loss of a scored token; the rest is its
            cross-entropy.
        target: What the divergence is measured against: the kept ids with all others in one bucket, the kept
            ids with unbiased draws from the tail, or half of each.
        rescored: Weigh the cross-entropy of scored tokens by the teacher's log-probability.
    """

    kl_weight: Fraction | None = None
    target: Target | None = None
    rescored: Rescored | None = None


class CurriculumPhase(Frozen):
    """A part of an on-policy run.

    Attributes:
        until: Ends after this share of the run's steps.
        low, medium, high: Shares of the reasoning modes of the prompts.
        rollouts: Answers to each prompt.
    """

    until: Share
    low: Fraction = 0.0
    medium: Fraction
    high: Fraction
    rollouts: PositiveInt

    @model_validator(mode="after")
    def _check(self) -> Self:
        if abs((total := self.low + self.medium + self.high) - 1.0) > 1e-9:
            raise ValueError(
                f"low, medium and high add up to {total:g}; they are shares of the prompts, so make it 1"
            )
        return self


class Rollouts(Frozen):
    """Answers that the student writes while it trains, scored by the teacher.

    They come by a logical clock: a round of `buffer_size // (delay + 1)` rollouts before every step, written
    with the weights of `delay` steps before, so that the run is defined however fast its parts are.

    Attributes:
        anchor_fraction: Share of the samples that are stored conversations, trained by cross-entropy; what is
            held out is measured on those.
        max_new_tokens: Tokens of a rollout, at most.
        buffer_size: Rollouts that are on their way or wait for their step, at most.
        max_staleness: Rollouts that were written by weights of more steps ago are dropped and counted.
        delay: Steps between the weights that write a round and the step that may first train on it.
        advantage_clip: Bound of the absolute advantage of a token; None leaves it as it is.
        baseline: Subtract the closed form of the expected advantage over the teacher's most likely ids and
            tail, which is unbiased and takes variance away.
        baseline_topk: Those ids.
        exclude_special_tokens: Train on no control token of the format; they are still written and scored.
        curriculum: Parts of the run, in order; the last one ends at 1.
    """

    anchor_fraction: Annotated[float, Field(gt=0, lt=1)]
    max_new_tokens: PositiveInt
    temperature: PositiveFloat = 1.0
    buffer_size: PositiveInt
    max_staleness: Count = 1
    delay: Count = 1
    advantage_clip: PositiveFloat | None = None
    baseline: bool = False
    baseline_topk: PositiveInt = 32
    exclude_special_tokens: bool = False
    curriculum: Annotated[tuple[CurriculumPhase, ...], Field(strict=False, min_length=1)]

    @model_validator(mode="after")
    def _check_clock(self) -> Self:
        if self.max_staleness < self.delay:
            raise ValueError(
                f"max_staleness = {self.max_staleness} is less than delay = {self.delay}: every rollout "
                "would be dropped before its first step; raise max_staleness or lower delay"
            )
        if round_size(self.buffer_size, self.delay) < 1:
            raise ValueError(
                f"buffer_size = {self.buffer_size} holds less than one rollout for each of delay + 1 = "
                f"{self.delay + 1} rounds on their way; raise it to {self.delay + 1} or more"
            )
        ends = [phase.until for phase in self.curriculum]
        if ends != sorted(set(ends)) or ends[-1] != 1.0:
            raise ValueError(
                f"curriculum: the phases end at until = {ends}; they must rise, and the last one must end at "
                "1"
            )
        return self


def check_rounds(rollouts: Rollouts, global_batch_size: int) -> None:
    """Refuse rounds that cannot fill a step.

    Raises:
        ValueError: A round has fewer rollouts than a step has samples for them.
    """
    made = round_size(rollouts.buffer_size, rollouts.delay)
    rows = rollout_rows(global_batch_size, rollouts.anchor_fraction)
    if made < rows:
        raise ValueError(
            f"buffer_size = {rollouts.buffer_size} with delay = {rollouts.delay} gives {made} rollouts for a "
            f"step, which has {rows} samples for them (global_batch_size = {global_batch_size}, "
            f"anchor_fraction = {rollouts.anchor_fraction}); raise buffer_size to "
            f"{rows * (rollouts.delay + 1)}"
        )
