"""Which conversations of a data set a teacher scores, shard by shard, in pieces that are always the same."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.manifest import SPLITS
from trainer.contract.topk.subset import scored_sequence
from trainer.data.indexed import SpanDocuments, manifest_value, read_manifest
from trainer.errors import TeacherError

PIECE_TOKENS = 1 << 15
"""A piece ends with the conversation that brings it to so many tokens. Pieces decide how rows are batched, so
a shard that was cut short is gone on with in the same ones, and gets the same bytes."""


@dataclass(frozen=True)
class Place:
    """A shard of the data set.

    Attributes:
        split: `train` or `valid`.
        shard: Its number.
        first: Number of its first conversation in the split.
        conversations: How many it has.
    """

    split: str
    shard: int
    first: int
    conversations: int

    def __str__(self) -> str:
        return f"{self.split}/shard_{self.shard:02d}"


@dataclass(frozen=True)
class Conversation:
    """A conversation to score.

    Attributes:
        sequence: Its number in its shard.
        tokens: int32 `[N]`.
        wanted: int64 `[n]`, its supervised positions, rising.
        spans: uint8 `[n]`, their spans.
    """

    sequence: int
    tokens: NDArray[np.int32]
    wanted: NDArray[np.int64]
    spans: NDArray[np.uint8]


class Scope:
    """A span-labelled data set as a teacher sees it.

    Args:
        root: Directory with `train/` and `valid/`, and the manifest in it or beside it.
        fraction: Share of the training conversations that is scored; the validation split is whole.

    Raises:
        DataError: The data set is damaged.
        TeacherError: It has no shards.
    """

    def __init__(self, root: Path, fraction: float) -> None:
        self.fraction = fraction
        manifest = read_manifest(root, SpanDocuments.SCHEMA)
        self.tokenizer_sha256 = str(manifest_value(manifest, "tokenizer", "model_sha256"))
        self.vocab_size = int(manifest_value(manifest, "tokenizer", "vocab_size"))
        self._documents = {split: SpanDocuments(root, split) for split in SPLITS if _shards(manifest, split)}
        self.places = [place for split in self._documents for place in _places(manifest, split)]
        if not self.places:
            raise TeacherError(f"{root} has no conversations: there is nothing to score")

    @property
    def longest(self) -> int:
        """Tokens of the longest conversation."""
        return max(int(documents.lengths.max()) for documents in self._documents.values())

    def conversations(
        self, place: Place, count: Callable[[int], None] = lambda _: None
    ) -> Iterator[Conversation]:
        """Go through the scored conversations of a shard, in order.

        Args:
            place: The shard.
            count: Told the supervised tokens of every conversation of the shard, scored or not.

        Raises:
            DataError: One is damaged.
        """
        documents = self._documents[place.split]
        for sequence in range(place.conversations):
            document = documents[place.first + sequence]
            wanted = np.flatnonzero(document.loss_mask)
            count(len(wanted))
            if place.split != "train" or scored_sequence(document.tokens, self.fraction):
                yield Conversation(sequence, document.tokens, wanted, document.span[wanted])

    def pieces(
        self, place: Place, count: Callable[[int], None] = lambda _: None
    ) -> Iterator[list[Conversation]]:
        """Go through them in pieces, each worth one call of a teacher; `count` as above."""
        piece: list[Conversation] = []
        tokens = 0
        for conversation in self.conversations(place, count):
            piece.append(conversation)
            tokens += len(conversation.tokens)
            if tokens >= PIECE_TOKENS:
                yield piece
                piece, tokens = [], 0
        if piece:
            yield piece


def _shards(manifest: dict[str, Any], split: str) -> list[dict[str, Any]]:
    splits = manifest_value(manifest, "splits")
    return sorted(splits.get(split, {}).get("shards", ()), key=lambda shard: str(shard["name"]))


def _places(manifest: dict[str, Any], split: str) -> Iterator[Place]:
    first = 0
    for shard in _shards(manifest, split):
        yield Place(split, int(shard["name"].removeprefix("shard_")), first, int(shard["rows"]))
        first += int(shard["rows"])
