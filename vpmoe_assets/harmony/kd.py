"""One shard of `synth_kd_v1`: conversations to token, loss-mask and span files.

A worker is idempotent: a finished shard is recognised and skipped, an unfinished one is written anew.
"""

from array import array
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from vpmoe_assets.errors import RowError, ShardRowError
from vpmoe_assets.harmony.completion import ShardWork, shard_key, shard_name
from vpmoe_assets.harmony.conversation import Turn
from vpmoe_assets.harmony.indexed import IndexedWriter, WrittenFile
from vpmoe_assets.harmony.kd_config import COUNTS, KdConfig
from vpmoe_assets.harmony.render import Encoded, Renderer
from vpmoe_assets.harmony.rows import RowBatch
from vpmoe_assets.harmony.sources import Source
from vpmoe_assets.harmony.split import SPLITS, split_hash, split_threshold
from vpmoe_assets.harmony.unique import hash_file

#: Array name in file names, and its dtype.
ARRAYS: dict[str, np.dtype[Any]] = {
    "tokens": np.dtype("<i4"),
    "lossmask": np.dtype("u1"),
    "span": np.dtype("u1"),
}


@dataclass(frozen=True)
class KdWorker:
    """Builds shards of one build; picklable, so that any process can run any shard.

    Args:
        sources: One per shard.
        config: What decides the bytes.
        config_hash: Hash over the configuration and the input.
        tokenizer_dir: Payload of `o200k_tokenizer`.
        payload_dir: Gets `train/` and `valid/`.
        state_dir: Gets completion records and the hashes of ids.
    """

    sources: tuple[Source, ...]
    config: KdConfig
    config_hash: str
    tokenizer_dir: Path
    payload_dir: Path
    state_dir: Path

    def __call__(self, shard: int, report: Callable[[int], None]) -> dict[str, Any]:
        """Build shard `shard` unless it is finished; returns its entry for the manifest step.

        Raises:
            ShardRowError: A row breaks the format.
            DataError: The input is damaged.
        """
        work = self.work(shard)
        with work.held():
            result = work.completed()
            reused = result is not None
            if result is None:
                result = _build(self, work, report)
            else:
                report(self.sources[shard].rows)
        return {**result, "reused": reused}

    def work(self, shard: int) -> ShardWork:
        """Where shard `shard` is built."""
        key = shard_key(
            kind="synth_kd_v1",
            shard=[shard, len(self.sources)],
            config_hash=self.config_hash,
            source=self.sources[shard].identity(),
        )
        return ShardWork(shard, key, self.payload_dir, self.state_dir)


@dataclass
class _Split:
    """The three open files of a split; opened at the first conversation, so an empty split leaves none."""

    directory: Path
    name: str
    stack: ExitStack
    writers: dict[str, IndexedWriter] = field(default_factory=dict)
    rows: int = 0
    tokens: int = 0

    def write(self, renderer: Renderer, conversations: list[Encoded]) -> None:
        if not conversations:
            return
        if not self.writers:
            self.directory.mkdir(exist_ok=True)
            for kind, dtype in ARRAYS.items():
                writer = IndexedWriter(self.directory / f"{self.name}_{kind}", dtype)
                self.writers[kind] = self.stack.enter_context(writer)
        arrays = renderer.concatenate(conversations)
        lengths = [conversation.length for conversation in conversations]
        self.writers["tokens"].append(arrays.tokens, lengths)
        self.writers["lossmask"].append(arrays.mask, lengths)
        self.writers["span"].append(arrays.span, lengths)
        self.rows += len(lengths)
        self.tokens += arrays.tokens.size

    def finish(self) -> dict[str, WrittenFile]:
        files = {}
        for kind, writer in self.writers.items():
            files[f"{self.name}_{kind}.bin"], files[f"{self.name}_{kind}.idx"] = writer.finish()
        return files


@lru_cache(maxsize=1)
def _renderer(tokenizer_dir: Path) -> Renderer:
    return Renderer(tokenizer_dir)


def _build(worker: KdWorker, work: ShardWork, report: Callable[[int], None]) -> dict[str, Any]:
    source, config = worker.sources[work.shard], worker.config
    renderer = _renderer(worker.tokenizer_dir)
    threshold = split_threshold(config.valid_fraction)
    work.begin()
    counts: dict[str, Counter[str]] = {split: Counter() for split in SPLITS}
    hashes, rows = array("Q"), array("Q")
    skipped = 0
    with ExitStack() as stack:
        splits = {split: _Split(work.payload_dir / split, shard_name(work.shard), stack) for split in SPLITS}
        for batch in source.batches():
            if len(rows) == source.limit:
                break
            left = source.limit - len(rows) if source.limit >= 0 else -1
            turns, ids, positions = _turns(source, work.shard, batch, left)
            skipped += (positions[-1] + 1 if len(turns) == left else len(batch)) - len(turns)
            encoded = _encode(source, work.shard, batch, renderer, turns, positions)
            pending: dict[str, list[Encoded]] = {split: [] for split in SPLITS}
            for turn, synth_id, position, conversation in zip(turns, ids, positions, encoded, strict=True):
                number = split_hash(synth_id)
                split = "valid" if number < threshold else "train"
                hashes.append(number)
                rows.append(batch.first_row + position)
                if conversation.length <= config.seq_len:
                    pending[split].append(conversation)
                    continue
                try:
                    shorter = _fit(renderer, conversation, turn, config.seq_len, counts[split])
                except RowError as error:
                    raise _at(source, work.shard, batch, position, error) from error
                if shorter is not None:
                    pending[split].append(shorter)
            for split, conversations in pending.items():
                splits[split].write(renderer, conversations)
            report(len(batch))
        written = {split: splits[split].finish() for split in SPLITS}
    sidecar = _save_hashes(work, hashes, rows)
    entry: dict[str, Any] = {"shard": work.shard, "skipped": skipped, "splits": {}}
    for split, state in splits.items():
        counts[split]["kept"] = state.rows
        entry["splits"][split] = {
            "rows": state.rows,
            "tokens": state.tokens,
            "counts": {name: counts[split][name] for name in COUNTS},
            "files": {
                name: {"bytes": file.bytes, "sha256": file.sha256} for name, file in written[split].items()
            },
        }
    files = {f"{split}/{name}": file.sha256 for split in SPLITS for name, file in written[split].items()}
    work.finish(files, [sidecar], entry)
    return entry


def _turns(
    source: Source, shard: int, batch: RowBatch, limit: int
) -> tuple[list[Turn], list[str], list[int]]:
    """Return the conversations of a batch with their ids and positions; with `limit` >= 0 only so many."""
    turns: list[Turn] = []
    ids: list[str] = []
    positions: list[int] = []
    for position, synth_id in enumerate(batch.columns["synth_id"]):
        if len(turns) == limit:
            break
        try:
            turn = source.turn(batch, position)
            if turn is None:
                continue
            if not synth_id:
                raise RowError("synth_id is missing")
        except RowError as error:
            raise _at(source, shard, batch, position, error) from error
        turns.append(turn)
        ids.append(synth_id)
        positions.append(position)
    return turns, ids, positions


def _encode(
    source: Source, shard: int, batch: RowBatch, renderer: Renderer, turns: list[Turn], positions: list[int]
) -> list[Encoded]:
    try:
        return renderer.encode_all(turns)
    except RowError:
        # One of them is at fault; one at a time shows which.
        for turn, position in zip(turns, positions, strict=True):
            try:
                renderer.encode(turn)
            except RowError as error:
                raise _at(source, shard, batch, position, error) from error
        raise


def _fit(
    renderer: Renderer, conversation: Encoded, turn: Turn, seq_len: int, counts: Counter[str]
) -> Encoded | None:
    """Return a conversation that is too long, cut, or None when it is to be dropped; counted either way."""
    cut = renderer.cut(conversation, seq_len)
    if cut.drop is not None:
        counts[cut.drop] += 1
        return None
    shorter = renderer.shorten(conversation, cut, turn)
    counts["truncated_analysis"] += 1
    counts["emptied_analysis"] += not shorter.analysis.size
    counts["truncated_user"] += bool(cut.user_from)
    return shorter


def _at(source: Source, shard: int, batch: RowBatch, position: int, error: RowError) -> ShardRowError:
    where = source.describe(batch.first_row + position)
    return ShardRowError(shard, where, batch.columns["synth_id"][position], error.reason)


def _save_hashes(work: ShardWork, hashes: "array[int]", rows: "array[int]") -> str:
    both = np.array([hashes, rows], dtype="<u8")
    path = hash_file(work.state_dir, work.shard)
    path.unlink(missing_ok=True)
    np.save(path, both[:, np.argsort(both[0], kind="stable")])
    return path.name
