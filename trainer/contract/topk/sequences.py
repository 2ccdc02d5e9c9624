"""Which sequences a block holds."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.errors import StoreError


@dataclass(frozen=True)
class Sequences:
    """The sequences of a block.

    Attributes:
        numbers: Ascending, int64 [s].
        starts: First row of each in the block's records, and behind them how many there are, int64 [s + 1].
    """

    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]

    @classmethod
    def of(cls, lengths: Sequence[tuple[int, int]]) -> "Sequences":
        """Return sequences with these numbers and lengths."""
        pairs = np.array(lengths, np.int64).reshape(-1, 2)
        return cls(pairs[:, 0], np.concatenate([[0], np.cumsum(pairs[:, 1])]))

    def rows(self, sequence: int) -> slice | None:
        """Return the rows of a sequence, None if it is not here."""
        at = int(np.searchsorted(self.numbers, sequence))
        if at == len(self.numbers) or self.numbers[at] != sequence:
            return None
        return slice(int(self.starts[at]), int(self.starts[at + 1]))


def pack_sequences(sequences: Sequences) -> bytes:
    """Return int64 numbers and int32 lengths."""
    return sequences.numbers.astype("<i8").tobytes() + np.diff(sequences.starts).astype("<i4").tobytes()


def unpack_sequences(payload: memoryview, count: int, tokens: int) -> tuple[Sequences, memoryview]:
    """Read the sequences at the beginning of a block.

    Args:
        payload: Of the block.
        count: How many they are.
        tokens: How many positions they have together.

    Returns:
        The sequences, and what stands behind them.

    Raises:
        StoreError: If they do not add up.
    """
    if not count or len(payload) < 12 * count:
        raise StoreError(f"{count} sequences do not fit")
    numbers = np.frombuffer(payload, "<i8", count).astype(np.int64)
    lengths = np.frombuffer(payload, "<i4", count, 8 * count).astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(lengths)])
    if (lengths < 0).any() or starts[-1] != tokens or (np.diff(numbers) <= 0).any():
        raise StoreError("its sequences do not add up")
    return Sequences(numbers, starts), payload[12 * count :]
