"""Reading one shard: its index, then a block at a time."""

import hashlib
import mmap
from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.topk.block import decode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.ids import IdTable, unpack_table
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.sequences import Sequences, unpack_sequences
from trainer.contract.topk.shard_file import (
    BLOCK,
    REMEDY,
    TABLE,
    Buffer,
    check_header,
    read_frame,
    read_index,
)

_NOT_SCORED = "it was not scored; score the data set with a subset_fraction that takes it in"
_TABLES = 4


class Maps:
    """Maps of files, the latest few kept open: a store may have more shards than a process may have files."""

    def __init__(self, most: int = 128):
        self._most = most
        self._open: OrderedDict[Path, Buffer] = OrderedDict()

    def get(self, path: Path) -> Buffer:
        """Return the content of a file.

        Raises:
            FileNotFoundError: If it is missing.
        """
        if path in self._open:
            self._open.move_to_end(path)
        else:
            with path.open("rb") as file:
                empty = not file.seek(0, 2)
                self._open[path] = b"" if empty else mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            if len(self._open) > self._most:
                self._open.popitem(last=False)
        return self._open[path]


class TopKShard:
    """A finished shard, mapped into memory.

    Attributes:
        path: The file.
        sequences: Numbers of all sequences, ascending, int64.
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
        maps: Maps | None = None,
    ):
        """Open a shard; its header, size and index are checked.

        Args:
            path: The file.
            identity: Of the store that it must belong to.
            split: Its split.
            shard: Its number.
            entry: What the manifest says of it.
            maps: Of the store; its own if there are none.

        Raises:
            StoreError: If it is missing, unfinished, cut off, damaged or another's.
        """
        self.path, self._identity, self._entry = path, identity, entry
        self._maps = maps or Maps()
        try:
            content = self._maps.get(path)
        except FileNotFoundError as error:
            raise StoreError(f"{path} is missing; score this shard again") from error
        if entry is not None and len(content) != entry["bytes"]:
            kind = "cut off" if len(content) < entry["bytes"] else "too long"
            raise StoreError(f"{path} is {kind}: {len(content)} bytes, expected {entry['bytes']}; {REMEDY}")
        check_header(content, identity, split, shard, path)
        index = read_index(content, path)
        self.sequences, self._index = index.numbers, index.blocks
        self.blocks = len(self._index)
        self._firsts = [block.first for block in self._index]
        self._tables: dict[int, IdTable] = {}

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
        frame, payload = read_frame(self._maps.get(self.path), entry.offset, name)
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
            frame, payload = read_frame(self._maps.get(self.path), offset, name)
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
        found = hashlib.sha256(self._maps.get(self.path)).hexdigest()
        if self._entry is not None and found != self._entry["sha256"]:
            raise StoreError(f"{self.path} has sha256 {found}, expected {self._entry['sha256']}; {REMEDY}")
