"""Two data sets in one order: a fixed share of conversations, the rest plain text.

Sample p of the run, counted from 0 over all global batches, is a conversation where `floor(p h + 1/2)`
steps up, h being the share as it is written in the config (0.2 is exactly one fifth). Conversations are so
spread as evenly as they can be: among any first n samples there are `n h` of them, give or take a half, and
exactly `a` in every `b` where `h = a / b`. Each data set is walked on its own, in its own order, epoch
after epoch, nothing left out.

So the whole state is each data set's (epoch, index); the place in the pattern follows from the number of
steps taken. Micro-batch size, rank and number of ranks have no part in it.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from trainer.contract.kinds import CONVERSATIONS, TEXT
from trainer.data.sampler import Sampler, SampleSource


class Place(NamedTuple):
    """Where a sample is: its kind, the epoch of that data set, and its number in the epoch."""

    part: str
    epoch: int
    number: int


def conversations_before(samples: int, share: float) -> int:
    """Conversations among the first `samples` of a run.

    Args:
        samples: How many samples.
        share: Share of conversations; its shortest decimal form is what counts.
    """
    return int(samples * Fraction(repr(share)) + Fraction(1, 2))


def parts_of(share: float) -> tuple[str, ...]:
    """Kinds of samples that a share of conversations calls for."""
    return (*((CONVERSATIONS,) if share > 0 else ()), *((TEXT,) if share < 1 else ()))


class MixtureSampler:
    """Draws global batches of both kinds; with a share of 0 or 1 it walks one data set alone.

    Attributes:
        samples: Samples drawn since step 0.
    """

    def __init__(
        self,
        sources: Mapping[str, SampleSource],
        share: float,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Start at the first sample of everything.

        Args:
            sources: Data sets by kind, exactly those that the share calls for.
            share: Share of conversations, in [0, 1].
            global_batch_size: Samples per optimizer step, over all ranks.
            micro_batch_size: Samples per forward pass.
            dp_rank: This process's data-parallel rank.
            dp_size: Data-parallel ranks.

        Raises:
            ValueError: Sources and share do not fit, or the global batch does not divide into micro-batches
                over the ranks.
        """
        if not 0 <= share <= 1:
            raise ValueError(f"share of conversations = {share}: must be in [0, 1]")
        if sorted(sources) != sorted(parts_of(share)):
            raise ValueError(
                f"a share of conversations of {share} needs {' and '.join(parts_of(share))}, "
                f"found {' and '.join(sources) or 'nothing'}"
            )
        self._share = share
        self._global_batch_size = global_batch_size
        self._samplers = {
            name: Sampler(
                source,
                global_batch_size=global_batch_size,
                micro_batch_size=micro_batch_size,
                dp_rank=dp_rank,
                dp_size=dp_size,
            )
            for name, source in sources.items()
        }
        self.samples = 0

    def next_batch(self) -> list[Place]:
        """Draw the next global batch and move past it.

        Returns:
            `global_batch_size` places, the same on every rank.
        """
        first, size = self.samples, self._global_batch_size
        marks = [conversations_before(first + offset, self._share) for offset in range(size + 1)]
        kinds = [CONVERSATIONS if marks[i + 1] > marks[i] else TEXT for i in range(size)]
        drawn = {name: iter(walk.take(kinds.count(name))) for name, walk in self._samplers.items()}
        self.samples += size
        return [Place(kind, *next(drawn[kind])) for kind in kinds]

    def share(self, batch: Sequence[Place]) -> list[list[Place]]:
        """Return this rank's part of a global batch, micro-batch by micro-batch; see `Sampler.share`."""
        return next(iter(self._samplers.values())).share(batch)

    @property
    def epochs(self) -> dict[str, int]:
        """Epoch of the next sample of each kind."""
        return {name: walk.epoch for name, walk in self._samplers.items()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the state of each data set's walk, by kind."""
        return {name: walk.state_dict() for name, walk in self._samplers.items()}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]], *, steps: int) -> None:
        """Go to a saved place.

        Args:
            states: Of `state_dict`, for the same kinds.
            steps: Optimizer steps taken until then.

        Raises:
            DataError: A saved place belongs to another order of samples, or lies outside its epoch.
        """
        for name, walk in self._samplers.items():
            walk.load_state_dict(dict(states[name]))
        self.samples = steps * self._global_batch_size
