"""Two kinds of samples in one order: a fixed share of one, the rest of the other.

Sample p of the run, counted from 0 over all global batches, is of the first kind where `floor(p h + 1/2)`
steps up, h being its share as it is written in the config (0.2 is exactly one fifth). That kind is so spread
as evenly as it can be: among any first n samples there are `n h` of it, give or take a half, and exactly `a`
in every `b` where `h = a / b`. Each kind is walked on its own, in its own order, epoch after epoch, nothing
left out.

So the whole state is that of each kind's walk, (epoch, index) for a data set; the place in the pattern
follows from the number of steps taken. Micro-batch size, rank and number of ranks have no part in it.
"""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from trainer.contract.mix import Mix
from trainer.data.sampler import Sampler, SampleSource, Walk, rank_share


class Place(NamedTuple):
    """Where a sample is: its kind, the epoch of that data set, and its number in the epoch."""

    part: str
    epoch: int
    number: int


def first_before(samples: int, share: float) -> int:
    """Count the samples of the first kind among the first `samples` of a run.

    Args:
        samples: How many samples.
        share: Share of the first kind; its shortest decimal form is what counts.
    """
    return int(samples * Fraction(repr(share)) + Fraction(1, 2))


class MixtureSampler:
    """Draws global batches of both kinds; with a share of 0 or 1 it walks one of them alone.

    Attributes:
        samples: Samples drawn since step 0.
    """

    def __init__(
        self,
        sources: Mapping[str, SampleSource | Walk],
        mix: Mix,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ) -> None:
        """Start at the first sample of everything.

        Args:
            sources: By kind, exactly those that the mix has: a data set, walked from its beginning, or what
                walks in an order of its own.
            mix: The kinds and their shares.
            global_batch_size: Samples per optimizer step, over all ranks.
            micro_batch_size: Samples per forward pass.
            dp_rank: This process's data-parallel rank.
            dp_size: Data-parallel ranks.

        Raises:
            ValueError: Sources and mix do not fit, or the global batch does not divide into micro-batches
                over the ranks.
        """
        if not 0 <= mix.share <= 1:
            raise ValueError(f"share of {mix.first} = {mix.share}: must be in [0, 1]")
        if sorted(sources) != sorted(mix.kinds):
            raise ValueError(
                f"a share of {mix.first} of {mix.share} needs {' and '.join(mix.kinds)}, "
                f"found {' and '.join(sources) or 'nothing'}"
            )
        self._mix = mix
        self._global_batch_size = global_batch_size
        self._layout = {"micro_batch_size": micro_batch_size, "dp_rank": dp_rank, "dp_size": dp_size}
        rank_share(range(global_batch_size), **self._layout)  # refuses a batch that does not divide
        self._walks: dict[str, Walk] = {
            name: source
            if isinstance(source, Walk)
            else Sampler(source, global_batch_size=global_batch_size, **self._layout)
            for name, source in sources.items()
        }
        self.samples = 0

    def next_batch(self) -> list[Place]:
        """Draw the next global batch and move past it.

        Returns:
            `global_batch_size` places, the same on every rank.
        """
        start, size, mix = self.samples, self._global_batch_size, self._mix
        marks = [first_before(start + offset, mix.share) for offset in range(size + 1)]
        kinds = [mix.first if marks[i + 1] > marks[i] else mix.rest for i in range(size)]
        drawn = {name: iter(walk.take(kinds.count(name))) for name, walk in self._walks.items()}
        self.samples += size
        return [Place(kind, *next(drawn[kind])) for kind in kinds]

    def share(self, batch: Sequence[Place]) -> list[list[Place]]:
        """Return this rank's part of a global batch, micro-batch by micro-batch; see `rank_share`."""
        return rank_share(batch, **self._layout)

    @property
    def epochs(self) -> dict[str, int]:
        """Epoch of the next sample of each kind."""
        return {name: walk.epoch for name, walk in self._walks.items()}

    def state_dict(self) -> dict[str, dict[str, Any]]:
        """Return the state of each kind's walk, by kind."""
        return {name: walk.state_dict() for name, walk in self._walks.items()}

    def load_state_dict(self, states: Mapping[str, Mapping[str, Any]], *, steps: int) -> None:
        """Go to a saved place.

        Args:
            states: Of `state_dict`, for the same kinds.
            steps: Optimizer steps taken until then.

        Raises:
            DataError: A saved place belongs to another order of samples, or lies outside its epoch.
        """
        for name, walk in self._walks.items():
            walk.load_state_dict(dict(states[name]))
        self.samples = steps * self._global_batch_size
