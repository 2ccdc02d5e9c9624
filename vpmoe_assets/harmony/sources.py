"""The two ways into the training shards: SYNTH rows, or the Harmony conversations made of them.

A source is one shard's input. Both give the same conversations in the same order, so the same bytes.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.conversation import TEXT_FIELDS, Turn, parse_messages, validate
from vpmoe_assets.harmony.rows import (
    InputFile,
    RowBatch,
    describe_row,
    inspect_file,
    read_batches,
    shard_range,
)
from vpmoe_assets.lineage.digest import file_sha256


class Source(Protocol):
    """The input of one shard."""

    @property
    def rows(self) -> int:
        """Rows to read, for the progress bar."""

    @property
    def limit(self) -> int:
        """Conversations to take at most; -1 is all."""

    def identity(self) -> dict[str, Any]:
        """Everything that decides which conversations come out."""

    def batches(self) -> Iterator[RowBatch]:
        """Return the rows, in order; every batch has a column `synth_id`.

        Raises:
            DataError: The input is damaged, or not the one that was recorded.
        """

    def turn(self, batch: RowBatch, position: int) -> Turn | None:
        """Return the conversation of a row, None when a text is missing or empty.

        Raises:
            RowError: The row breaks the format.
        """

    def describe(self, row: int) -> str:
        """Where a row stands, in words."""

    def synth_id(self, row: int) -> str | None:
        """Id of one row, read again from the input."""


@dataclass(frozen=True)
class SynthSource:
    """Rows `[start, stop)` of SYNTH-shaped parquet files."""

    files: tuple[InputFile, ...]
    start: int
    stop: int
    scaffold: Scaffold
    limit: int = -1

    @property
    def rows(self) -> int:
        """Rows in the range."""
        return self.stop - self.start

    def identity(self) -> dict[str, Any]:
        """Contents and range, not names: a moved input is the same input."""
        return {
            "files": [[file.rows, file.sha256] for file in self.files],
            "range": [self.start, self.stop],
            "scaffold": self.scaffold.as_dict(),
            "limit": self.limit,
        }

    def batches(self) -> Iterator[RowBatch]:
        """Return the id and the three texts."""
        return read_batches(self.files, ("synth_id", *TEXT_FIELDS), self.start, self.stop)

    def turn(self, batch: RowBatch, position: int) -> Turn | None:
        """Return the texts behind the scaffold."""
        columns = batch.columns
        query = columns["query"][position]
        reasoning = columns["synthetic_reasoning"][position]
        answer = columns["synthetic_answer"][position]
        if not (query and reasoning and answer):
            return None
        return Turn(self.scaffold.opening, query, reasoning, answer)

    def describe(self, row: int) -> str:
        """Row of the whole input, and of its file."""
        return describe_row(self.files, row)

    def synth_id(self, row: int) -> str | None:
        """Read one id."""
        return next(iter(read_batches(self.files, ("synth_id",), row, row + 1))).columns["synth_id"][0]

    def complete_rows(self, at_most: int) -> int:
        """How many rows have all three texts, counting no further than `at_most`."""
        found = 0
        if at_most > 0:
            for batch in read_batches(self.files, TEXT_FIELDS, self.start, self.stop):
                found += sum(all(texts) for texts in zip(*batch.columns.values(), strict=True))
                if found >= at_most:
                    return at_most
        return found


@dataclass(frozen=True)
class HarmonySource:
    """One shard of synth_harmony, with the sha256 that its manifest records."""

    file: InputFile
    limit: int = -1

    @property
    def rows(self) -> int:
        """Rows in the shard, or the limit."""
        return self.file.rows if self.limit < 0 else min(self.limit, self.file.rows)

    def identity(self) -> dict[str, Any]:
        """Content and limit."""
        return {"sha256": self.file.sha256, "rows": self.file.rows, "limit": self.limit}

    def batches(self) -> Iterator[RowBatch]:
        """Return the id and the conversation, after the file was checked against its manifest."""
        path = Path(self.file.path)
        found = file_sha256(path) if path.is_file() else "no such file"
        if found != self.file.sha256:
            raise DataError(
                f"{path}: sha256 is {found}, its manifest says {self.file.sha256}; "
                "materialise synth_harmony again"
            )
        yield from read_batches([self.file], ("synth_id", "messages_json"), 0, self.rows)

    def turn(self, batch: RowBatch, position: int) -> Turn | None:
        """Parse and check the stored conversation."""
        return validate(parse_messages(batch.columns["messages_json"][position]))

    def describe(self, row: int) -> str:
        """Row of the shard."""
        return f"row {row} ({self.file.name})"

    def synth_id(self, row: int) -> str | None:
        """Read one id."""
        return next(iter(read_batches([self.file], ("synth_id",), row, row + 1))).columns["synth_id"][0]


def synth_sources(
    files: Sequence[InputFile], num_shards: int, scaffold: Scaffold, max_rows: int = -1
) -> list[SynthSource]:
    """Divide SYNTH rows among shards; `max_rows` >= 0 takes only the first that many complete rows."""
    total = sum(file.rows for file in files)
    sources = []
    left = max_rows
    for shard in range(num_shards):
        start, stop = shard_range(total, shard, num_shards)
        source = SynthSource(tuple(files), start, stop, scaffold)
        if max_rows >= 0:
            taken = source.complete_rows(left)
            source, left = SynthSource(tuple(files), start, stop, scaffold, taken), left - taken
        sources.append(source)
    return sources


def harmony_sources(harmony_dir: Path, manifest: dict[str, Any], max_rows: int = -1) -> list[HarmonySource]:
    """Return the shards that a synth_harmony manifest lists, in its order.

    Raises:
        DataError: A shard is absent, lacks a column, or has another number of rows than the manifest says.
    """
    sources = []
    left = max_rows
    for entry in manifest["storage"]["shards"]:
        # Its worker compares the sha256, just before it reads the file.
        file = inspect_file(harmony_dir / entry["path"], ("synth_id", "messages_json"), entry["sha256"])
        if file.rows != entry["rows"]:
            raise DataError(
                f"{file.path} has {file.rows} rows, its manifest says {entry['rows']}; "
                "materialise synth_harmony again"
            )
        taken = -1 if max_rows < 0 else min(file.rows, left)
        left -= max(taken, 0)
        sources.append(HarmonySource(file, taken))
    return sources
