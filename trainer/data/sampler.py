"""Which samples come next. The whole state is two integers.

The global order of samples does not know how many ranks read it: a batch is drawn whole, by address, and then
cut into micro-batches and ranks. So a run may be resumed with another data-parallel size, or another
micro-batch size, and sees the same batches.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import torch

from trainer.data.kd import Sample
from trainer.errors import DataError


class SampleSource(Protocol):
    """What a sampler reads: `PackedDataset` and `TextDataset`."""

    def num_samples(self, epoch: int) -> int:
        """Sample in an epoch."""

    def pack_index_sha256(self, epoch: int) -> str:
        """Identity of an epoch's order."""

    def sample(self, epoch: int, index: int) -> Sample:
        """One sample: tensors of shape [S]."""


Address = tuple[int, int]
"""Place of a sample: its epoch, and its index in that epoch."""


FILLERS = {
    "teacher_ids": -1,
    "teacher_logprobs": -torch.inf,
    "teacher_tail": 0.0,
    "teacher_draws": -1,
    "teacher_label_logprob": 0.0,
    "behaviour_logprob": 0.0,
    "excluded": False,
}
"""What stands in a field that only some kinds of samples have, at every place of a sample of another kind."""


def collate(samples: Sequence[Sample]) -> Sample:
    """Stack samples [S, ...] to a micro-batch [B, S, ...], field by field.

    Samples of two kinds may meet in a micro-batch: where one of them lacks a field of `FILLERS` that another
    has, the filler takes its place. A field that none of them has is not there.

    Raises:
        KeyError: A field that every sample must have is missing in some.
    """
    names = list(dict.fromkeys(name for sample in samples for name in sample))
    return {name: torch.stack(_field(name, samples)) for name in names}


def _field(name: str, samples: Sequence[Sample]) -> list[torch.Tensor]:
    if all(name in sample for sample in samples):
        return [sample[name] for sample in samples]
    like = next(sample[name] for sample in samples if name in sample)
    filler = torch.full_like(like, FILLERS[name])
    return [sample.get(name, filler) for sample in samples]


def rank_share[T](
    batch: Sequence[T], *, micro_batch_size: int, dp_rank: int = 0, dp_size: int = 1
) -> list[list[T]]:
    """Return a rank's part of a global batch, micro-batch by micro-batch.

    Micro-batch m of all ranks together is a contiguous run of the batch, so the first micro-batches of one
    rank with dp_size = 1 are those that the ranks of a larger run take side by side.

    Raises:
        ValueError: The batch does not divide into micro-batches over the ranks.
    """
    for name, value in (("global_batch_size", len(batch)), ("micro_batch_size", micro_batch_size)):
        if value < 1:
            raise ValueError(f"{name} = {value}: must be at least 1")
    if not 0 <= dp_rank < dp_size:
        raise ValueError(f"dp_rank = {dp_rank}: must be in [0, dp_size = {dp_size})")
    stride = micro_batch_size * dp_size
    if len(batch) % stride:
        raise ValueError(
            f"global_batch_size = {len(batch)} is not a multiple of micro_batch_size * dp_size ="
            f" {micro_batch_size} * {dp_size} = {stride}"
        )
    first = dp_rank * micro_batch_size
    return [
        list(batch[start + first : start + first + micro_batch_size])
        for start in range(0, len(batch), stride)
    ]


class Walk(ABC):
    """An order of samples, and the place of a run in it.

    Attributes:
        epoch: Epoch of the next sample.
    """

    epoch: int

    @abstractmethod
    def take(self, count: int) -> list[Address]:
        """Draw the next `count` samples, and move past them."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]:
        """Return the place as JSON values, with the identity of the order that it is a place in."""

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            DataError: It belongs to another order.
        """


class Sampler(Walk):
    """Walks a data set, epoch after epoch, one global batch at a time.

    A batch that reaches the end of an epoch goes on in the next one; no sample is dropped.

    Attributes:
        epoch: Epoch of the next sample.
        index: Index of the next sample in that epoch; equal to the epoch's size where it is used up.
    """

    def __init__(
        self,
        dataset: SampleSource,
        *,
        global_batch_size: int,
        micro_batch_size: int,
        dp_rank: int = 0,
        dp_size: int = 1,
    ):
        """Start at the first sample of epoch 0.

        Args:
            dataset: Source of the samples.
            global_batch_size: Samples per optimizer step, over all ranks.
            micro_batch_size: Samples per forward pass, `B`.
            dp_rank: This process's data-parallel rank.
            dp_size: Data-parallel ranks.

        Raises:
            ValueError: If the global batch does not divide into micro-batches over the ranks.
        """
        self._layout = {"micro_batch_size": micro_batch_size, "dp_rank": dp_rank, "dp_size": dp_size}
        rank_share(range(global_batch_size), **self._layout)  # refuses a batch that does not divide
        self._dataset = dataset
        self.epoch = 0
        self.index = 0

    def take(self, count: int) -> list[Address]:
        """Draw the next `count` samples, on any boundary, and move past them."""
        batch: list[Address] = []
        while len(batch) < count:
            size = self._dataset.num_samples(self.epoch)
            take = min(size - self.index, count - len(batch))
            batch.extend((self.epoch, self.index + offset) for offset in range(take))
            self.index += take
            if len(batch) < count:
                self.epoch, self.index = self.epoch + 1, 0
        return batch

    def share[T](self, batch: Sequence[T]) -> list[list[T]]:
        """Return this rank's part of a global batch, micro-batch by micro-batch; see `rank_share`."""
        return rank_share(batch, **self._layout)

    def state_dict(self) -> dict[str, Any]:
        """Return the state to resume from, with the identity of the order that it is a place in."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "pack_index_sha256": self._dataset.pack_index_sha256(self.epoch),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            DataError: If the saved place belongs to another order of samples (other data, sequence length,
                block or seed), or lies outside its epoch. The sampler then stays where it was.
        """
        epoch, index, saved = int(state["epoch"]), int(state["index"]), state["pack_index_sha256"]
        found = self._dataset.pack_index_sha256(epoch)
        if saved != found:
            raise DataError(
                f"the checkpoint was made with pack index {saved} in epoch {epoch}, this data gives"
                f" {found}: the data set, seq_len, pack.block or seed changed. Resume with those of the"
                " checkpoint, or start a new run"
            )
        size = self._dataset.num_samples(epoch)
        if not 0 <= index <= size:
            raise DataError(f"the checkpoint stands at sample {index} of epoch {epoch}, which has {size}")
        self.epoch, self.index = epoch, index


def held_out(
    dataset: SampleSource,
    *,
    micro_batch_size: int,
    max_samples: int | None = None,
    dp_rank: int = 0,
    dp_size: int = 1,
) -> Iterator[Sample]:
    """Read a validation split once, in its epoch 0 order; ranks take every `dp_size`-th micro-batch.

    The last micro-batch may be smaller, and ranks may get one more or less: a held-out loss must be summed
    over ranks with its token counts, never averaged over micro-batches.

    Args:
        dataset: The validation samples.
        micro_batch_size: Samples per forward pass, `B`.
        max_samples: Stop after that many samples over all ranks; all of them by default.
        dp_rank: This process's data-parallel rank.
        dp_size: Data-parallel ranks.

    Yields:
        Micro-batches of tensors [B, S].
    """
    size = dataset.num_samples(0)
    size = size if max_samples is None else min(size, max_samples)
    for start in range(dp_rank * micro_batch_size, size, dp_size * micro_batch_size):
        yield collate(
            [dataset.sample(0, index) for index in range(start, min(start + micro_batch_size, size))]
        )
