"""The logical clock of on-policy training: which rollouts are made when, and which of them a step may use.

Round s, counted from 1, is made for step s: `q = buffer_size // (delay + 1)` rollouts of the weights after
step `max(0, s - 1 - delay)`. So at the beginning of step s rounds up to `s + delay` are made, and the teacher
has `delay` steps to judge a round while the model trains on others. How fast either of them is decides
nothing: a run is defined by this clock, and repeated by it.
"""

from collections.abc import Iterator
from dataclasses import dataclass

from trainer.contract.rounds import round_size


@dataclass(frozen=True)
class Clock:
    """When rounds are made and how long they live; of the recipe's `rollouts`, which refuses what cannot be.

    Attributes:
        steps: Of the run; no round is made for a later step.
        delay: Steps that lie between the weights of a round and the step it is for.
        max_staleness: A rollout made with the weights after step b serves step s while `s - 1 - b` is at most
            this.
        buffer_size: Rollouts that are under way at once, over all rounds.
    """

    steps: int
    delay: int
    max_staleness: int
    buffer_size: int

    @property
    def per_round(self) -> int:
        """Rollouts of a round, q."""
        return round_size(self.buffer_size, self.delay)

    def born(self, number: int) -> int:
        """Return the step after which the weights of a round stand."""
        return max(0, number - 1 - self.delay)

    def due(self, step: int) -> Iterator[int]:
        """Yield the rounds to make at the beginning of a step, with the weights after the step before."""
        first = 1 if step == 1 else step + self.delay
        yield from range(first, min(step + self.delay, self.steps) + 1)

    def under_way(self, step: int) -> range:
        """Return the rounds that are made and not yet handed out when a step has ended."""
        return range(step + 1, min(step + self.delay, self.steps) + 1) if step else range(0)

    def staleness(self, born: int, step: int) -> int:
        """Return how many steps older than it could be a rollout is at a step."""
        return step - 1 - born
