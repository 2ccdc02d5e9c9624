"""Writing a shard: block by block, so that what was scored before a kill is not scored again."""

import hashlib
import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.contract.files import sync
from trainer.contract.topk.block import MOST_CELLS, decode, encode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.ids import pack_table, unpack_table
from trainer.contract.topk.learning import TableMaker
from trainer.contract.topk.records import TopKRecords, joined
from trainer.contract.topk.sequences import Sequences, pack_sequences, unpack_sequences
from trainer.contract.topk.shard_file import (
    BLOCK,
    END,
    END_MAGIC,
    INDEX,
    TABLE,
    Buffer,
    Index,
    IndexEntry,
    check_header,
    pack_frame,
    pack_header,
    pack_index,
    whole_frames,
)

BLOCK_TOKENS = 4096
"""A block ends with the sequence that brings it to so many tokens, or to `BLOCK_CELLS` ids."""
BLOCK_CELLS = 1 << 20


class TopKShardWriter:
    """One shard, from its first sequence or from where an earlier writer was stopped.

    Bytes depend on identity and records alone: neither on how often the writer was stopped nor on when.

    Attributes:
        next_sequence: The first sequence that is not on the disk yet; those before it are done.
        finished: Whether the shard was closed before: it takes no sequence, `close` returns its entry.
    """

    def __init__(self, path: Path, identity: StoreIdentity, *, split: str, shard: int):
        """Open a shard for writing; whatever follows its last whole block is cut off.

        Args:
            path: The file; its directory must exist.
            identity: Of the store; a file of another one is refused.
            split: `"train"` or `"valid"`.
            shard: Number of the data set's shard.

        Raises:
            StoreError: If the file is another store's or another shard's.
        """
        self.path, self._identity = path, identity
        self._split, self._shard = split, shard
        self.next_sequence, self.finished = 0, False
        self._pending: list[tuple[int, TopKRecords]] = []
        self._cells = self._tokens = 0
        self._blocks: list[IndexEntry] = []
        self._numbers: list[NDArray[np.int64]] = []
        self._tables = TableMaker(identity.vocabulary)
        self._table_offset = 0
        header = pack_header(identity, split, shard)
        created = not path.exists()
        # Not "a": the position of a file that is cut off has to be set.
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        if header.startswith(self._file.read(len(header))) and self._file.tell() < len(header):
            self._end_at(0)  # nothing yet, or killed before the header was whole
            self._write(header)
        else:
            with mmap.mmap(self._file.fileno(), 0, access=mmap.ACCESS_READ) as content:
                end = self._resume(content, check_header(content, identity, split, shard, path))
            self._end_at(end)
        if created:
            sync(path.parent)

    def add(self, sequence: int, records: TopKRecords) -> None:
        """Append the records of a sequence.

        Args:
            sequence: Its number in the data set's shard, above the one before.
            records: Of its supervised positions; may be empty.

        Raises:
            StoreError: If the number does not rise, the shard is finished, or the records are impossible.
        """
        if self.finished:
            raise StoreError(f"{self.path} is finished; delete it to write it again")
        lowest = self._pending[-1][0] + 1 if self._pending else self.next_sequence
        if sequence < lowest:
            raise StoreError(f"{self.path}: sequence {sequence} is already written; go on at {lowest}")
        terms = self._identity
        try:
            records.check(terms.topk, terms.tail_draws, terms.vocabulary, terms.logprob_error)
        except StoreError as error:
            raise StoreError(f"{self.path}: sequence {sequence}: {error}") from error
        cells = len(records) * max(terms.topk, terms.tail_draws)
        if cells > MOST_CELLS:
            raise StoreError(
                f"{self.path}: sequence {sequence} has {cells} ids, at most {MOST_CELLS} fit; lower topk"
            )
        if self._cells + cells > MOST_CELLS:
            self._flush()
        self._pending.append((sequence, records))
        self._cells += cells
        self._tokens += len(records)
        if self._tokens >= BLOCK_TOKENS or self._cells >= BLOCK_CELLS:
            self._flush()

    def close(self) -> dict[str, Any]:
        """Write what is pending and the index.

        Returns:
            The shard's entry in the manifest: `name`, `shard`, `sequences`, `tokens`, `bytes`, `sha256`.
        """
        if not self.finished:
            self._flush()
            offset = self._file.tell()
            self._write(
                pack_frame(INDEX, pack_index(Index(self._blocks, self._all_numbers())))
                + END.pack(offset, END_MAGIC)
            )
            self.finished = True
        size = self._file.tell()
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.close()
        return {
            "name": self.path.name,
            "shard": self._shard,
            "sequences": sum(entry.sequences for entry in self._blocks),
            "tokens": sum(entry.tokens for entry in self._blocks),
            "bytes": size,
            "sha256": sha256,
        }

    def _resume(self, content: Buffer, begin: int) -> int:
        """Take up a file where it stops to be whole; return that byte."""
        end = begin
        for frame, payload in whole_frames(content, begin, str(self.path)):
            if frame.tag == INDEX:
                self.finished = content[frame.end :] == END.pack(frame.offset, END_MAGIC)
                return frame.end + END.size if self.finished else end
            end = frame.end
            if frame.tag == TABLE:
                self._tables.take(unpack_table(payload, self._identity.vocabulary))
                self._table_offset = frame.offset
                continue
            sequences, columns = unpack_sequences(payload, frame.sequences, frame.tokens)
            if self._tables.learning:
                self._tables.learn(self._decode(columns, frame.tokens))
            self._note(frame.offset, sequences)
        return end

    def _flush(self) -> None:
        if not self._pending:
            return
        records = joined([records for _, records in self._pending])
        if self._tables.due:
            table = self._tables.make(records)
            self._table_offset = self._file.tell()
            self._write(pack_frame(TABLE, pack_table(table)))
        sequences = Sequences.of([(number, len(records)) for number, records in self._pending])
        payload = pack_sequences(sequences) + self._encode(records)
        offset = self._file.tell()
        first = int(sequences.numbers[0])
        self._write(pack_frame(BLOCK, payload, first, len(self._pending), len(records)))
        if self._tables.learning:
            self._tables.learn(records)
        self._note(offset, sequences)
        self._pending, self._cells, self._tokens = [], 0, 0

    def _note(self, offset: int, sequences: Sequences) -> None:
        numbers, tokens = sequences.numbers, int(sequences.starts[-1])
        entry = IndexEntry(offset, self._table_offset, int(numbers[0]), len(numbers), tokens)
        self._blocks.append(entry)
        self._numbers.append(numbers)
        self.next_sequence = int(numbers[-1]) + 1

    def _all_numbers(self) -> NDArray[np.int64]:
        return np.concatenate([np.zeros(0, np.int64), *self._numbers])

    def _encode(self, records: TopKRecords) -> bytes:
        terms = self._identity
        return encode(records, self._tables.table, terms.logprob_error, terms.mass is not None)

    def _decode(self, columns: memoryview, tokens: int) -> TopKRecords:
        terms = self._identity
        return decode(
            columns,
            tokens,
            terms.topk,
            terms.tail_draws,
            self._tables.table,
            terms.logprob_error,
            terms.mass is not None,
        )

    def _end_at(self, offset: int) -> None:
        self._file.seek(offset)
        self._file.truncate()

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
