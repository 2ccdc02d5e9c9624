"""Plain text for healing: documents concatenated and cut into equal windows.

Text has no structure that a cut could break, so every window is full. Boundaries are still kept: positions
restart and `doc_id` steps after each EOD, and the first token of a document is never a target, because
nothing that the model may look at announces it.
"""

import hashlib
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.indexed import (
    SPAN_TEXT,
    check_last_tokens,
    check_single_eod,
    manifest_value,
    open_indexed,
    read_manifest,
)
from trainer.data.kd import Sample
from trainer.data.rng import permutation, stream
from trainer.errors import DataError


class TextDocuments:
    """One split of a plain-text data set.

    Attributes:
        manifest: The data set's manifest.
        eod: End-of-document token id, from the manifest.
        lengths: Tokens of each document with its EOD [n] int32.
    """

    SCHEMA = "healing_text_v1"

    def __init__(self, root: Path, split: str):
        """Open and check a split.

        Args:
            root: Directory with `train/` and `valid/`, the manifest inside it or beside it.
            split: `"train"` or `"valid"`.

        Raises:
            DataError: If the manifest or a file is missing, damaged or does not fit; the message names it.
        """
        self.manifest = read_manifest(root, self.SCHEMA)
        self.eod = int(manifest_value(self.manifest, "config", "eod_token_id"))
        self._prefix = root / split / f"{self.SCHEMA}_tokens"
        if not list(self._prefix.parent.glob(self._prefix.name + ".*")):
            raise DataError(f"{self._prefix}.bin is missing: the {split!r} split is empty")
        self._dataset = open_indexed(self._prefix, np.dtype(np.int32))
        check_last_tokens(self._dataset, self.eod, Path(f"{self._prefix}.bin"))
        self.lengths: NDArray[np.int32] = np.array(self._dataset.sequence_lengths, dtype=np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def describe(self, document: int) -> str:
        """Name a document for a person: its place in its file."""
        return f"document {document} of {self._prefix}.bin"

    def __getitem__(self, document: int) -> NDArray[np.int32]:
        """Read one document with its EOD [n] into memory and check it.

        Raises:
            DataError: If EOD is not exactly the last token.
        """
        tokens: NDArray[np.int32] = np.array(self._dataset.get(document))
        check_single_eod(tokens, self.eod, self.describe(document))
        return tokens


class _Epoch:
    """The order of one epoch: documents, their ends in the concatenation, windows."""

    def __init__(self, lengths: NDArray[np.int32], seq_len: int, seed: int, epoch: int):
        bits = stream(seed, epoch)
        self.documents = permutation(bits, len(lengths))
        self.ends = np.cumsum(lengths[self.documents], dtype=np.int64)
        # Windows take seq_len + 1 tokens and step by seq_len: every token but the first is a label once.
        self.windows = permutation(bits, int(self.ends[-1] - 1) // seq_len)
        digest = hashlib.sha256()
        for array in (self.documents, self.ends, self.windows):
            digest.update(array.astype("<i8", copy=False))
        self.sha256 = digest.hexdigest()


class TextDataset:
    """Samples of `seq_len` tokens cut from shuffled plain text, addressed by (epoch, index).

    Same interface as `PackedDataset`. Every token is `span_id` 3 (text) wherever it is supervised: the
    loss then is the plain mean over supervised tokens, and a batch that mixes text with conversations keeps
    the three means apart.
    """

    def __init__(self, documents: TextDocuments, *, seq_len: int, seed: int):
        """Hold the documents; nothing is copied but the order of an epoch (24 bytes a document or window).

        Args:
            documents: The split to train on.
            seq_len: Tokens per sample, `S`.
            seed: Experiment seed.

        Raises:
            DataError: If the split is too small for one window.
            ValueError: If `seq_len` is not positive.
        """
        if seq_len < 1:
            raise ValueError(f"seq_len = {seq_len}: must be at least 1")
        self.documents = documents
        self.seq_len = seq_len
        total = int(documents.lengths.sum(dtype=np.int64))
        if total < seq_len + 1:
            raise DataError(f"{total} tokens of text do not fill one window of {seq_len + 1}; take more text")
        self._epoch = lru_cache(maxsize=2)(lambda epoch: _Epoch(documents.lengths, seq_len, seed, epoch))

    def num_samples(self, epoch: int) -> int:
        """Whole windows in an epoch; the tokens after the last one are left out."""
        return len(self._epoch(epoch).windows)

    def fill_ratio(self, epoch: int) -> float:
        """Return 1: windows have no padding."""
        return 1.0

    def pack_index_sha256(self, epoch: int) -> str:
        """Identity of an epoch's order; what a resumed run compares."""
        return self._epoch(epoch).sha256

    def describe(self, epoch: int, index: int) -> str:
        """Name a sample for a person, by the document that it begins in."""
        order = self._epoch(epoch)
        begin = int(order.windows[index]) * self.seq_len
        place = int(np.searchsorted(order.ends, begin, side="right"))
        first = self.documents.describe(int(order.documents[place]))
        return f"window {index} of epoch {epoch} (from {first} on)"

    def sample(self, epoch: int, index: int) -> Sample:
        """Make one sample.

        A window that begins inside a document starts at position 0 there: the text before it is not visible.
        The mask is 1 but at EOD positions, whose label is the first token of the next document.

        Args:
            epoch: Epoch number from 0.
            index: Sample of the epoch.

        Returns:
            Tensors of shape [S], see `trainer.data.kd.Sample`.

        Raises:
            IndexError: If the epoch has no such sample.
            DataError: If a document is damaged.
        """
        order = self._epoch(epoch)
        if not 0 <= index < len(order.windows):
            raise IndexError(f"sample {index}: this epoch has samples 0 to {len(order.windows) - 1}")
        begin = int(order.windows[index]) * self.seq_len
        end = begin + self.seq_len + 1
        pieces = []
        place = int(np.searchsorted(order.ends, begin, side="right"))
        at = begin
        while at < end:
            tokens = self.documents[int(order.documents[place])]
            offset = at - (int(order.ends[place]) - len(tokens))
            pieces.append(tokens[offset : offset + end - at])
            at += len(pieces[-1])
            place += 1
        window = np.concatenate(pieces).astype(np.int64)
        ends_here = window[:-1] == self.documents.eod
        doc_id = np.cumsum(ends_here) - ends_here
        places = np.arange(self.seq_len)
        begins_here = np.concatenate(([True], ends_here[:-1]))
        position_ids = places - np.maximum.accumulate(np.where(begins_here, places, 0))
        return {
            "tokens": torch.from_numpy(window[:-1].copy()),
            "labels": torch.from_numpy(window[1:].copy()),
            "loss_mask": torch.from_numpy((~ends_here).astype(np.float32)),
            "span_id": torch.from_numpy(np.where(ends_here, 0, SPAN_TEXT)),
            "position_ids": torch.from_numpy(position_ids),
            "doc_id": torch.from_numpy(doc_id),
        }
