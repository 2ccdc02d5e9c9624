"""Reading one shard: its index, then a block at a time."""

import hashlib
import mmap
from bisect import bisect_right
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.block import decode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.ids import IdTable, unpack_table
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.sequences import Sequences, unpack_sequences
from trainer.contract.topk.shard_file import (
    BLOCK,
    FRAME_BYTES,
    REMEDY,
    TABLE,
    Buffer,
    check_header,
    read_frame,
    read_index,
)

_NOT_SCORED = "it was not scored; score the data set with a subset_fraction that takes it in"
_TABLES = 4


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
                self._map: Buffer = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else b""
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing; score this shard again") from error
        check_header(self._map, identity, split, shard, path)
        self._index = read_index(self._map, path)
        self._firsts = [entry.first for entry in self._index]
        self._tables: dict[int, IdTable] = {}
        self.blocks = len(self._index)

    @cached_property
    def sequences(self) -> NDArray[np.int64]:
        """Numbers of all sequences, ascending.

        They stand at the beginning of each block, and only that is read: a shard may be as large as a disk. A
        block's checksum is looked at when its records are read, or here where the numbers cannot be right.
        """
        numbers = [np.zeros(0, np.int64), *(self._numbers(block) for block in range(self.blocks))]
        found = np.concatenate(numbers)
        if (np.diff(found) <= 0).any():
            for block in range(self.blocks):
                self._open_block(block)  # names the one that is damaged
            raise StoreError(f"{self.path}: blocks share sequences; {REMEDY}")
        return found

    def _numbers(self, block: int) -> NDArray[np.int64]:
        entry = self._index[block]
        begin = entry.offset + FRAME_BYTES
        if entry.sequences and begin + 8 * entry.sequences <= len(self._map):
            found = np.frombuffer(self._map, "<i8", entry.sequences, begin).astype(np.int64)
            if found[0] == entry.first:
                return found
        return self._open_block(block)[0].numbers  # names what is damaged

    def block_of(self, sequence: int) -> int:
        """Return the block that has a sequence, if one does.

        Raises:
            StoreError: If the shard is empty.
        """
        if not self.blocks:
            raise StoreError(
                f"{self.path} is empty, so it has no record of sequence {sequence}: {_NOT_SCORED}"
            )
        return max(0, bisect_right(self._firsts, sequence) - 1)

    def read_block(self, block: int) -> tuple[Sequences, TopKRecords]:
        """Return the sequences of a block and their records, one behind the other.

        Raises:
            StoreError: If the block is damaged.
        """
        sequences, payload = self._open_block(block)
        terms, entry = self._identity, self._index[block]
        table = self._table(entry.table, block)
        try:
            records = decode(
                payload,
                entry.tokens,
                terms.topk,
                terms.tail_draws,
                table,
                terms.logprob_error,
                terms.mass is not None,
            )
        except StoreError as error:
            raise StoreError(f"{self.path}: block {block} is damaged: {error}; {REMEDY}") from error
        return sequences, records

    def rows(self, sequences: Sequences, sequence: int, block: int) -> slice:
        """Return the rows of a sequence in its block.

        Raises:
            StoreError: If it is not there.
        """
        rows = sequences.rows(sequence)
        if rows is None:
            raise StoreError(
                f"{self.path}: block {block} has no record of sequence {sequence}: {_NOT_SCORED}"
            )
        return rows

    def _open_block(self, block: int) -> tuple[Sequences, memoryview]:
        entry, name = self._index[block], f"{self.path}: block {block}"
        frame, payload = read_frame(self._map, entry.offset, name)
        found = (frame.tag, frame.first, frame.sequences, frame.tokens)
        if found != (BLOCK, entry.first, entry.sequences, entry.tokens):
            raise StoreError(f"{name} is not the one in the index; {REMEDY}")
        try:
            return unpack_sequences(payload, entry.sequences, entry.tokens)
        except StoreError as error:
            raise StoreError(f"{name} is damaged: {error}; {REMEDY}") from error

    def _table(self, offset: int, block: int) -> IdTable:
        if offset not in self._tables:
            name = f"{self.path}: the table of block {block}"
            frame, payload = read_frame(self._map, offset, name)
            if frame.tag != TABLE:
                raise StoreError(f"{name} is not where the index says; {REMEDY}")
            if len(self._tables) >= _TABLES:
                self._tables.clear()
            try:
                self._tables[offset] = unpack_table(payload, self._identity.vocabulary)
            except StoreError as error:
                raise StoreError(f"{name} is damaged: {error}; {REMEDY}") from error
        return self._tables[offset]

    def verify_block(self, block: int) -> None:
        """Read a block and hold its records to what records are.

        Raises:
            StoreError: If they are not.
        """
        _, records = self.read_block(block)
        terms = self._identity
        try:
            records.check(terms.topk, terms.tail_draws, terms.vocabulary, terms.logprob_error)
        except StoreError as error:
            raise StoreError(f"{self.path}: block {block} is damaged: {error}; {REMEDY}") from error

    def verify(self) -> None:
        """Compare the sha256 of the file with the manifest's.

        Raises:
            StoreError: If it is another.
        """
        found = hashlib.sha256(self._map).hexdigest()
        if self._entry is not None and found != self._entry["sha256"]:
            raise StoreError(f"{self.path} has sha256 {found}, expected {self._entry['sha256']}; {REMEDY}")
