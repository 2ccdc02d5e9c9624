"""Writing a shard: block by block, so that what was scored before a kill is not scored again."""

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np

from trainer.contract.files import sync
from trainer.contract.topk.block import MOST_CELLS, encode
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.shard_file import (
    BLOCK,
    END,
    END_MAGIC,
    INDEX,
    Frame,
    check_header,
    pack_frame,
    pack_header,
    whole_frames,
)

BLOCK_TOKENS = 8192
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
        self._blocks: list[Frame] = []
        header = pack_header(identity, split, shard)
        created = not path.exists()
        # Not "a": the position of a file that is cut off has to be set.
        self._file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o644), "r+b")
        content = self._file.read()
        if len(content) < len(header) and header.startswith(content):
            self._restart(header)  # nothing yet, or killed before the header was whole
        else:
            self._resume(content, check_header(content, identity, split, shard, path))
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
            index = np.array(
                [(block.offset, block.first, block.sequences, block.tokens) for block in self._blocks], "<i8"
            ).reshape(-1, 4)
            offset = self._file.tell()
            self._write(pack_frame(INDEX, index.tobytes()) + END.pack(offset, END_MAGIC))
            self.finished = True
        size = self._file.tell()
        self._file.seek(0)
        sha256 = hashlib.file_digest(self._file, "sha256").hexdigest()
        self._file.close()
        return {
            "name": self.path.name,
            "shard": self._shard,
            "sequences": sum(block.sequences for block in self._blocks),
            "tokens": sum(block.tokens for block in self._blocks),
            "bytes": size,
            "sha256": sha256,
        }

    def _restart(self, header: bytes) -> None:
        self._file.seek(0)
        self._file.truncate()
        self._write(header)

    def _resume(self, content: bytes, end: int) -> None:
        for frame, payload in whole_frames(content, end, str(self.path)):
            if frame.tag == INDEX:
                self.finished = content[frame.end :] == END.pack(frame.offset, END_MAGIC)
                end = frame.end + END.size if self.finished else end
                break
            end = frame.end
            if frame.tag == BLOCK:
                self._blocks.append(frame)
                self.next_sequence = int(np.frombuffer(payload, "<i8", 1, 0)[0]) + 1
        self._file.seek(end)
        self._file.truncate()

    def _flush(self) -> None:
        if not self._pending:
            return
        numbers = np.array([number for number, _ in self._pending], "<i8")
        lengths = np.array([len(records) for _, records in self._pending], "<i4")
        parts = [records for _, records in self._pending]
        joined = TopKRecords(
            *(
                np.concatenate([getattr(part, name) for part in parts])
                for name in ("label_logprob", "ids", "logprobs", "tail_mass", "draws")
            )
        )
        last = int(numbers[-1])
        payload = numbers[-1:].tobytes() + numbers.tobytes() + lengths.tobytes() + encode(joined)
        offset = self._file.tell()
        frame = Frame(BLOCK, offset, len(payload), int(numbers[0]), len(numbers), int(lengths.sum()))
        self._write(pack_frame(BLOCK, payload, frame.first, frame.sequences, frame.tokens))
        self._blocks.append(frame)
        self.next_sequence = last + 1
        self._pending, self._cells, self._tokens = [], 0, 0

    def _write(self, content: bytes) -> None:
        self._file.write(content)
        self._file.flush()
        os.fsync(self._file.fileno())
