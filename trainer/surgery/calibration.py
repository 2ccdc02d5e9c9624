"""The pinned slice of plain text on which a surgery measures activations."""

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.rng import permutation, stream
from trainer.data.text import TextDocuments
from trainer.errors import DataError

BATCH_TOKENS = 8192
"""Tokens of a forward pass: eight rows of 1024, four of 2048."""

NO_LABEL = -1

_ORDER = "train documents in the order of epoch 0 of the seed, concatenated"


@dataclass(frozen=True)
class Batch:
    """Rows of equal length without padding, each int64 `[B, S]`.

    Attributes:
        tokens: Token ids.
        position_ids: Position inside the document, from 0 at the start of the row or of a document.
        doc_id: Number of the document inside its row.
        labels: The next token; -1 where the next token begins another document or lies outside the slice.
    """

    tokens: torch.Tensor
    position_ids: torch.Tensor
    doc_id: torch.Tensor
    labels: torch.Tensor

    def to(self, device: str | torch.device) -> "Batch":
        """Return the same batch on a device."""
        return Batch(*(t.to(device) for t in (self.tokens, self.position_ids, self.doc_id, self.labels)))


@dataclass(frozen=True)
class Calibration:
    """The first `tokens` tokens of a stated order of documents, in rows of `seq_len`.

    Attributes:
        ids: int32 `[tokens]`; the last document may be cut.
        seq_len: S; a row that begins inside a document does not see the text before it.
        documents: Documents in the slice.
        eod: End-of-document token id.
        seed: Seed of the order.
    """

    ids: NDArray[np.int32]
    seq_len: int
    documents: int
    eod: int
    seed: int

    @property
    def tokens(self) -> int:
        """Number of tokens."""
        return len(self.ids)

    @property
    def sha256(self) -> str:
        """Digest of the ids, int32 little endian."""
        return hashlib.sha256(self.ids.astype("<i4", copy=False).tobytes()).hexdigest()

    def batches(self, *, tokens: int | None = None, batch_tokens: int = BATCH_TOKENS) -> list[Batch]:
        """Cut the slice into batches; a shorter last row is a batch of its own, so nothing is padding.

        Args:
            tokens: Take the first so many tokens of the slice only.
            batch_tokens: Most tokens of a batch; at least one row.
        """
        ids = self.ids[:tokens].astype(np.int64)
        following = np.append(self.ids[1:], NO_LABEL)[: len(ids)].astype(np.int64)
        following[ids == self.eod] = NO_LABEL
        whole = len(ids) // self.seq_len * self.seq_len
        step = max(1, batch_tokens // self.seq_len) * self.seq_len
        cuts = [(start, min(start + step, whole), self.seq_len) for start in range(0, whole, step)]
        if whole < len(ids):
            cuts.append((whole, len(ids), len(ids) - whole))
        return [_batch(ids[a:b].reshape(-1, s), following[a:b].reshape(-1, s), self.eod) for a, b, s in cuts]

    def describe(self) -> dict[str, int | str]:
        """Return what a report says of the slice."""
        return {
            "tokens": self.tokens,
            "documents": self.documents,
            "seq_len": self.seq_len,
            "order": _ORDER,
            "seed": self.seed,
            "sha256": self.sha256,
        }


def load_calibration(dataset: Path, *, tokens: int, seq_len: int, seed: int) -> Calibration:
    """Take the calibration slice of a plain-text data set.

    Args:
        dataset: The data set `healing_text_v1`: the directory of its splits.
        tokens: Length of the slice.
        seq_len: Tokens of a row.
        seed: Seed of the order of documents.

    Raises:
        DataError: The data set is damaged, or its train split is shorter than the slice.
        ValueError: A number is not positive.
    """
    if tokens < 1 or seq_len < 1:
        raise ValueError(f"tokens = {tokens}, seq_len = {seq_len}: both must be at least 1")
    documents = TextDocuments(dataset, "train")
    found = int(documents.lengths.sum(dtype=np.int64))
    if found < tokens:
        raise DataError(
            f"calibration_tokens = {tokens}, but the train split of {dataset} has {found} tokens; lower "
            "surgery.calibration_tokens or raise data.healing_text_v1.max_tokens"
        )
    pieces: list[NDArray[np.int32]] = []
    taken = 0
    for document in permutation(stream(seed, 0), len(documents)):
        if taken >= tokens:
            break
        pieces.append(documents[int(document)][: tokens - taken])
        taken += len(pieces[-1])
    return Calibration(np.concatenate(pieces), seq_len, len(pieces), documents.eod, seed)


def _batch(tokens: NDArray[np.int64], labels: NDArray[np.int64], eod: int) -> Batch:
    ends = tokens == eod
    doc_id = np.cumsum(ends, axis=1) - ends
    places = np.broadcast_to(np.arange(tokens.shape[1]), tokens.shape)
    begins = np.concatenate((np.ones((len(tokens), 1), dtype=bool), ends[:, :-1]), axis=1)
    position_ids = places - np.maximum.accumulate(np.where(begins, places, 0), axis=1)
    return Batch(*(torch.from_numpy(np.ascontiguousarray(x)) for x in (tokens, position_ids, doc_id, labels)))
