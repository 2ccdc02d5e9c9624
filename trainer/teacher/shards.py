"""One shard of a top-K store: scored, read back, summed up, and never done twice."""

import fcntl
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from typing import Any

import numpy as np

from trainer.contract.files import replace_json
from trainer.contract.json_text import parse_json
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.shard_file import shard_name
from trainer.contract.topk.shard_reader import TopKShard
from trainer.contract.topk.writer import TopKShardWriter
from trainer.data.indexed import SPAN_FINAL, SPAN_REASONING
from trainer.errors import TeacherError
from trainer.teacher.modes import ModeWriter
from trainer.teacher.scope import Conversation, Place, Scope
from trainer.teacher.teacher import TailDraws, Teacher, TeacherScores

SPANS = {SPAN_REASONING: "reasoning", SPAN_FINAL: "final"}


@dataclass(frozen=True)
class Terms:
    """How conversations are scored.

    Attributes:
        identity: Of the store.
        seed: Of the draws from the tails.
        mode: Reasoning mode that the teacher is asked in.
        modes: Writes it; None where the conversations say it already.
    """

    identity: StoreIdentity
    seed: int
    mode: str
    modes: ModeWriter | None


@dataclass
class Tally:
    """What a shard holds, in numbers that its bytes decide.

    Attributes:
        conversations: Scored ones.
        of_conversations: All of them.
        of_tokens: Supervised tokens of all of them.
        tokens: Scored tokens, by span.
        logprob: Sum of the labels' log-probabilities, by span.
        listed: Sum of the ids listed.
        tail: Sum of the tails' masses.
        pieces: Calls of the teacher that the shard takes.
    """

    conversations: int = 0
    of_conversations: int = 0
    of_tokens: int = 0
    tokens: dict[str, int] = field(default_factory=lambda: dict.fromkeys(SPANS.values(), 0))
    logprob: dict[str, float] = field(default_factory=lambda: dict.fromkeys(SPANS.values(), 0.0))
    listed: int = 0
    tail: float = 0.0
    pieces: int = 0

    def add(self, records: TopKRecords, spans: Any) -> None:
        """Count the records of a conversation."""
        self.conversations += 1
        for number, name in SPANS.items():
            here = records.label_logprob[spans == number].astype(np.float64)
            self.tokens[name] += len(here)
            self.logprob[name] += float(here.sum())
        self.listed += int(records.counts.sum())
        self.tail += float(records.tail_mass.sum(dtype=np.float64))

    def plus(self, other: "Tally") -> "Tally":
        """Return the numbers of both."""
        return Tally(
            self.conversations + other.conversations,
            self.of_conversations + other.of_conversations,
            self.of_tokens + other.of_tokens,
            {name: count + other.tokens[name] for name, count in self.tokens.items()},
            {name: total + other.logprob[name] for name, total in self.logprob.items()},
            self.listed + other.listed,
            self.tail + other.tail,
            self.pieces + other.pieces,
        )


@dataclass(frozen=True)
class Finished:
    """A finished shard.

    Attributes:
        entry: As the store's manifest has it.
        tally: What it holds.
        seconds: Spent on it by the process that finished it.
        self_test: What the teacher's self-test found in that process.
    """

    entry: dict[str, Any]
    tally: Tally
    seconds: float
    self_test: dict[str, Any]


def shard_path(root: Path, place: Place) -> Path:
    """Return where a shard is made."""
    return root / place.split / shard_name(place.shard)


def read_finished(root: Path, place: Place, identity: StoreIdentity) -> Finished | None:
    """Return what an earlier process finished; None if the shard is still to do.

    A note of another store, or without its file, is worth nothing.
    """
    path = shard_path(root, place)
    try:
        note = parse_json(path.with_suffix(".json").read_text(encoding="utf-8"))
        if note["binding"] != identity.digest or path.stat().st_size != note["entry"]["bytes"]:
            return None
        return Finished(note["entry"], Tally(**note["tally"]), note["seconds"], note["self_test"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def write_finished(root: Path, place: Place, identity: StoreIdentity, finished: Finished) -> None:
    """Note that a shard is finished."""
    note = {
        "binding": identity.digest,
        "entry": finished.entry,
        "tally": vars(finished.tally),
        "seconds": finished.seconds,
        "self_test": finished.self_test,
    }
    replace_json(shard_path(root, place).with_suffix(".json"), note)


@contextmanager
def held(root: Path, place: Place) -> Iterator[None]:
    """Keep other processes from a shard while the block runs; the lock goes with the process.

    Raises:
        TeacherError: Another process has it.
    """
    path = shard_path(root, place).with_suffix(".lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise TeacherError(
                f"{place} is being scored by another process in {root}: wait for it, or end it and start "
                "again"
            ) from None
        yield
    finally:
        os.close(handle)


def score_shard(
    root: Path,
    scope: Scope,
    place: Place,
    teacher: Teacher,
    terms: Terms,
    done: Callable[[int, Sequence[Conversation], Sequence[TeacherScores]], None],
) -> dict[str, Any]:
    """Score what is still to score of a shard.

    A piece is asked for as a whole, also where its first conversations are stored already: so batches, and
    with them rounding, do not depend on where an earlier process was stopped.

    Args:
        root: Where shards are made.
        scope: The data set.
        place: The shard.
        teacher: Who is asked.
        terms: How.
        done: Called after every piece with its number in the shard; may raise to stop, what is on the disk
            stays.

    Returns:
        The shard's entry in the manifest.
    """
    path = shard_path(root, place)
    path.parent.mkdir(parents=True, exist_ok=True)
    writer = TopKShardWriter(path, terms.identity, split=place.split, shard=place.shard)
    if not writer.finished:
        for number, piece in enumerate(scope.pieces(place)):
            if piece[-1].sequence < writer.next_sequence:
                continue
            scores = ask(teacher, place, piece, terms)
            for conversation, one in zip(piece, scores, strict=True):
                if conversation.sequence >= writer.next_sequence:
                    writer.add(conversation.sequence, records_of(one))
            done(number, piece, scores)
    return writer.close()


def ask(teacher: Teacher, place: Place, piece: Sequence[Conversation], terms: Terms) -> list[TeacherScores]:
    """Score conversations."""
    sequences, wanted = questions(piece, terms)
    draws = terms.identity.tail_draws
    tail = TailDraws(draws, [draw_key(terms.seed, place, one.sequence) for one in piece]) if draws else None
    return teacher.score(sequences, wanted, terms.identity.topk, mass=terms.identity.mass, tail=tail)


def questions(piece: Sequence[Conversation], terms: Terms) -> tuple[list[Sequence[int]], list[Sequence[int]]]:
    """Return token ids and wanted positions of conversations, in the mode that is asked for."""
    sequences: list[Sequence[int]] = []
    wanted: list[Sequence[int]] = []
    for conversation in piece:
        if terms.modes is None:
            sequences.append(conversation.tokens.tolist())
            wanted.append(conversation.wanted.tolist())
        else:
            other = terms.modes.rewrite(conversation.tokens, terms.mode)
            sequences.append(other.tokens.tolist())
            wanted.append(other.positions(conversation.wanted).tolist())
    return sequences, wanted


def draw_key(seed: int, place: Place, sequence: int) -> int:
    """Return the key of a conversation's draws: its address in the data set and the seed, nothing else."""
    text = f"vpmoe.topk.draws/1 {seed} {place.split} {place.shard} {sequence}"
    return int.from_bytes(blake2b(text.encode(), digest_size=16).digest(), "little")


def records_of(scores: TeacherScores) -> TopKRecords:
    """Return scores as the store takes them."""
    return TopKRecords(scores.label_logprob, scores.ids, scores.logprobs, scores.tail_mass, scores.draws)


def tally_shard(
    root: Path, scope: Scope, place: Place, identity: StoreIdentity, entry: dict[str, Any]
) -> Tally:
    """Read a finished shard back, compare it with the data set, and count what it holds.

    Raises:
        StoreError: A block is damaged, or has no record of a conversation.
        TeacherError: Conversations and records are not the same in number.
    """
    shard = TopKShard(shard_path(root, place), identity, split=place.split, shard=place.shard, entry=entry)
    shard.verify()
    tally = Tally(of_conversations=place.conversations)

    def count(supervised: int) -> None:
        tally.of_tokens += supervised

    block, parts = -1, None
    for piece in scope.pieces(place, count):
        tally.pieces += 1
        for conversation in piece:
            if (at := shard.block_of(conversation.sequence)) != block or parts is None:
                block, parts = at, shard.read_block(at)
            sequences, records = parts
            mine = records[shard.rows(sequences, conversation.sequence, block)]
            if len(mine) != len(conversation.wanted):
                raise TeacherError(
                    f"{shard.path}: sequence {conversation.sequence} has {len(mine)} records, "
                    f"{len(conversation.wanted)} supervised tokens; delete the shard and score it again"
                )
            tally.add(mine, conversation.spans)
    if tally.conversations != entry["sequences"]:
        raise TeacherError(
            f"{shard.path} has {entry['sequences']} sequences, {tally.conversations} are due; delete the "
            "shard "
            "and score it again"
        )
    return tally
