"""Rollouts between the student that made them and the step that trains on them.

A round is under way from the beginning of the step that makes it until the step it is for. Then its rollouts
join the pool, behind what earlier steps left there; the step drops what is too old, fills its rows from the
front, and leaves what does not fit. By the clock no rollout outlives `max_staleness`, so there are never more
than `(max_staleness + 1) * q` of them, and those of the first `delay` rounds, which have the same weights.
"""

from collections.abc import Sequence

from trainer.rollouts.clock import Clock
from trainer.rollouts.rollout import Rollout


def fill(lengths: Sequence[int], rows: int, capacity: int) -> list[int | None]:
    """Give each rollout, in order, the emptiest row; where that has no room, none has.

    Args:
        lengths: Tokens of each rollout.
        rows: How many rows there are.
        capacity: Tokens that a row holds.

    Returns:
        The row of each, or None for one that has to wait.
    """
    filled = [0] * rows
    placed: list[int | None] = []
    for length in lengths:
        row = min(range(rows), key=filled.__getitem__) if rows else None
        if row is not None and filled[row] + length <= capacity:
            filled[row] += length
            placed.append(row)
        else:
            placed.append(None)
    return placed


class Buffer:
    """Rounds under way, and the pool.

    Attributes:
        clock: Says what is too old.
        under_way: Rounds that are made and not yet handed out, by number.
        pool: Scored rollouts that wait for a row, oldest round first.
        dropped: Rollouts dropped for their age since step 0.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self.under_way: dict[int, tuple[Rollout, ...]] = {}
        self.pool: list[Rollout] = []
        self.dropped = 0

    def put(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """Add a round that was just made.

        Raises:
            ValueError: It is there already.
        """
        if number in self.under_way:
            raise ValueError(f"round {number} of rollouts is under way already")
        self.under_way[number] = tuple(rollouts)

    def arrive(self, step: int, rollouts: Sequence[Rollout]) -> int:
        """Move the round of a step into the pool, after dropping what is too old for this step.

        Args:
            step: The step, which is its round's number.
            rollouts: That round's, with their scores.

        Returns:
            How many were dropped.
        """
        del self.under_way[step]
        kept = [one for one in self.pool if self.clock.staleness(one.born, step) <= self.clock.max_staleness]
        dropped = len(self.pool) - len(kept)
        self.dropped += dropped
        self.pool = [*kept, *rollouts]
        return dropped

    def take(self, rows: int, capacity: int) -> list[list[Rollout]]:
        """Fill rows from the front of the pool.

        Args:
            rows: How many.
            capacity: Tokens that a row holds.

        Returns:
            What is in each row, in order.
        """
        placed = fill([one.length for one in self.pool], rows, capacity)
        taken: list[list[Rollout]] = [[] for _ in range(rows)]
        left: list[Rollout] = []
        for one, row in zip(self.pool, placed, strict=True):
            (left if row is None else taken[row]).append(one)
        self.pool = left
        return taken
