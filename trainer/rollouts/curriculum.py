"""Which reasoning modes are asked for, and how many answers a prompt gets, as a run goes on."""

from collections.abc import Sequence
from typing import Protocol

from trainer.rollouts.chance import draw

MODES = ("low", "medium", "high")


class Phase(Protocol):
    """A stretch of the run, of the recipe's `curriculum`.

    Attributes:
        until: Share of the run's steps after which it ends.
        low, medium, high: Shares of the prompts, together 1.
        rollouts: Answers to each prompt.
    """

    @property
    def until(self) -> float: ...  # noqa: D102
    @property
    def low(self) -> float: ...  # noqa: D102
    @property
    def medium(self) -> float: ...  # noqa: D102
    @property
    def high(self) -> float: ...  # noqa: D102
    @property
    def rollouts(self) -> int: ...  # noqa: D102


def phase_of[P: Phase](curriculum: Sequence[P], number: int, steps: int) -> P:
    """Return the phase of a round, which is that of the step it is for.

    Args:
        curriculum: Phases in order; the last one is until 1.
        number: Of the round, from 1.
        steps: Of the run.
    """
    for phase in curriculum:
        if number <= phase.until * steps:
            return phase
    return curriculum[-1]  # a last `until` that rounding left below 1


def mode_of(phase: Phase, seed: int, epoch: int, document: int) -> str:
    """Return the reasoning mode of a prompt: a function of what names it, drawn by the shares of a phase.

    Args:
        phase: Of the round that asks the prompt.
        seed: The experiment's seed.
        epoch: Of the walk over the prompts.
        document: Number of the conversation.
    """
    place = draw("mode", seed, epoch, document) / 2**64
    for mode, share in (("low", phase.low), ("medium", phase.medium)):
        if place < share:
            return mode
        place -= share
    return "high"
