"""Reading one shard: its index, then a block at a time."""

import hashlib
import mmap
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.block import decode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.shard_file import BLOCK, END, END_MAGIC, INDEX, REMEDY, check_header, read_frame


@dataclass(frozen=True)
class Sequences:
    """The sequences of a block.

    Attributes:
        numbers: Ascending, int64 [s].
        starts: First row of each in the block's records, and their number at the end, int64 [s + 1].
    """

    numbers: NDArray[np.int64]
    starts: NDArray[np.int64]

    def rows(self, sequence: int, shard: "TopKShard", block: int) -> slice:
        """Return the rows of a sequence.

        Raises:
            StoreError: If it is not in the block.
        """
        at = int(np.searchsorted(self.numbers, sequence))
        if at == len(self.numbers) or self.numbers[at] != sequence:
            raise StoreError(
                f"{shard.path}: block {block} has no record of sequence {sequence}: {_NOT_SCORED}"
            )
        return slice(int(self.starts[at]), int(self.starts[at + 1]))


_NOT_SCORED = "it was not scored; score the data set with this subset_fraction"


class TopKShard:
    """A finished shard, mapped into memory.

    Attributes:
        path: The file.
        blocks: Number of blocks.
    """

    def __init__(
        self,
        path: Path,
        identity: StoreIdentity,
        *,
        split: str,
        shard: int,
        entry: Mapping[str, Any] | None = None,
    ):
        """Open a shard; its header, size and index are checked.

        Args:
            path: The file.
            identity: Of the store that it must belong to.
            split: Its split.
            shard: Its number.
            entry: What the manifest says of it.

        Raises:
            StoreError: If it is missing, unfinished, cut off, damaged or another's.
        """
        self.path, self._identity, self._entry = path, identity, entry
        try:
            with path.open("rb") as file:
                size = file.seek(0, 2)
                if entry is not None and size != entry["bytes"]:
                    kind = "cut off" if size < entry["bytes"] else "too long"
                    raise StoreError(f"{path} is {kind}: {size} bytes, expected {entry['bytes']}; {REMEDY}")
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing; score this shard again") from error
        check_header(self._map, identity, split, shard, path)
        self._index = self._read_index()
        self.blocks = len(self._index)

    def _read_index(self) -> NDArray[np.int64]:
        tail = bytes(self._map[-END.size :])
        if len(tail) < END.size or tail[8:] != END_MAGIC:
            raise StoreError(f"{self.path} is unfinished or cut off; score this shard again to complete it")
        offset, _ = END.unpack(tail)
        frame, payload = read_frame(self._map, min(offset, len(self._map)), f"{self.path}: the index")
        if frame.tag != INDEX or frame.end + END.size != len(self._map) or len(payload) % 32:
            raise StoreError(f"{self.path}: the index is damaged; {REMEDY}")
        index = np.frombuffer(payload, "<i8").reshape(-1, 4).astype(np.int64)
        if len(index) and ((index < 0).any() or (np.diff(index[:, :2], axis=0) <= 0).any()):
            raise StoreError(f"{self.path}: the index is damaged; {REMEDY}")
        return index

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """Numbers of all sequences, ascending."""
        if not self.blocks:
            return np.zeros(0, np.int64)
        return np.concatenate([self._open_block(block)[0].numbers for block in range(self.blocks)])

    def block_of(self, sequence: int) -> int:
        """Return the block that a sequence is in, if it is in the shard.

        Raises:
            StoreError: If no block can have it.
        """
        block = int(np.searchsorted(self._index[:, 1], sequence, side="right")) - 1
        if block < 0:
            raise StoreError(f"{self.path}: no block has a record of sequence {sequence}: {_NOT_SCORED}")
        return block

    def read_block(self, block: int) -> tuple[Sequences, TopKRecords]:
        """Return the sequences of a block and their records, one behind the other.

        Raises:
            StoreError: If the block is damaged.
        """
        sequences, payload = self._open_block(block)
        terms = self._identity
        try:
            records = decode(payload, int(sequences.starts[-1]), terms.topk, terms.tail_draws)
        except StoreError as error:
            raise StoreError(f"{self.path}: block {block} is damaged: {error}; {REMEDY}") from error
        return sequences, records

    def _open_block(self, block: int) -> tuple[Sequences, memoryview]:
        offset, first, count, tokens = (int(value) for value in self._index[block])
        name = f"{self.path}: block {block}"
        frame, payload = read_frame(self._map, offset, name)
        if (frame.tag, frame.first, frame.sequences, frame.tokens) != (BLOCK, first, count, tokens):
            raise StoreError(f"{name} is not the one in the index; {REMEDY}")
        if len(payload) < 8 + 12 * count:
            raise StoreError(f"{name} is damaged: {count} sequences do not fit; {REMEDY}")
        numbers = np.frombuffer(payload, "<i8", count, 8).astype(np.int64)
        lengths = np.frombuffer(payload, "<i4", count, 8 + 8 * count).astype(np.int64)
        starts = np.concatenate([[0], np.cumsum(lengths)])
        if (lengths < 0).any() or starts[-1] != tokens or (np.diff(numbers) <= 0).any():
            raise StoreError(f"{name} is damaged: its sequences do not add up; {REMEDY}")
        return Sequences(numbers, starts), payload[8 + 12 * count :]

    def verify(self) -> None:
        """Compare the sha256 of the file with the manifest's.

        Raises:
            StoreError: If it is another.
        """
        found = hashlib.sha256(self._map).hexdigest()
        if self._entry is not None and found != self._entry["sha256"]:
            raise StoreError(f"{self.path} has sha256 {found}, expected {self._entry['sha256']}; {REMEDY}")
