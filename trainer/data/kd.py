"""Packed samples of a span-labelled conversation data set."""

from collections import OrderedDict
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.data.indexed import SpanDocument
from trainer.data.pack_index import PackIndex, PackKey, load_or_build
from trainer.model.document_mask import PADDING

Sample = dict[str, torch.Tensor]
"""`tokens`, `labels`, `span_id`, `position_ids`, `doc_id` [S] int64 and `loss_mask` [S]
float32; some kinds of samples have more fields, [S] or [S, ...], see `trainer.data.sampler.FILLERS`."""


class Documents(Protocol):
    """What is packed: `SpanDocuments`, or some of them."""

    lengths: NDArray[np.int32]
    eod: int

    @property
    def lengths_sha256(self) -> str:
        """Digest of the lengths."""

    def __getitem__(self, document: int) -> SpanDocument:
        """Read one conversation."""

    def describe(self, document: int) -> str:
        """Name a document for a person."""


class PackedDataset:
    """Samples of `seq_len` tokens made of whole conversations, addressed by (epoch, index).

    A sample is a pure function of the documents, `seq_len`, `block`, `seed`, epoch and index.
    """

    def __init__(self, documents: Documents, *, seq_len: int, block: int, seed: int, cache_dir: Path):
        """Hold the documents; an epoch is packed when it is first asked for.

        Args:
            documents: The split to train on.
            seq_len: Tokens per sample, `S`.
            block: Documents packed together.
            seed: Experiment seed.
            cache_dir: Where pack indices are stored. May be shared and may be deleted.
        """
        self.documents = documents
        self.seq_len = seq_len
        self._block = block
        self._seed = seed
        self._cache_dir = cache_dir
        self._epochs: OrderedDict[int, PackIndex] = OrderedDict()

    def _pack_index(self, epoch: int) -> PackIndex:
        if epoch not in self._epochs:
            key = PackKey(self.documents.lengths_sha256, self.seq_len, self._block, self._seed, epoch)
            self._epochs[epoch] = load_or_build(
                self._cache_dir, key, self.documents.lengths, self.documents.describe
            )
            if len(self._epochs) > 2:  # a batch touches two epochs at the most, where one ends
                self._epochs.popitem(last=False)
        self._epochs.move_to_end(epoch)
        return self._epochs[epoch]

    def num_samples(self, epoch: int) -> int:
        """Sample in an epoch; epochs differ by a few, since each is packed from its own permutation."""
        return self._pack_index(epoch).num_samples

    def fill_ratio(self, epoch: int) -> float:
        """Share of an epoch's positions that hold document tokens rather than padding."""
        return self._pack_index(epoch).fill_ratio

    def pack_index_sha256(self, epoch: int) -> str:
        """Identity of an epoch's order; what a resumed run compares."""
        return self._pack_index(epoch).sha256

    def documents_of(self, epoch: int, index: int) -> NDArray[np.int64]:
        """Document numbers of a sample in row order [k]; `doc_id` j of the sample is element j."""
        return self._pack_index(epoch).documents(index)

    def describe(self, epoch: int, index: int) -> str:
        """Name a sample for a person, by its first documents."""
        documents = self.documents_of(epoch, index).tolist()
        first = ", ".join(self.documents.describe(document) for document in documents[:3])
        return f"sample {index} of epoch {epoch} ({first}{', …' if len(documents) > 3 else ''})"

    def sample(self, epoch: int, index: int) -> Sample:
        """Make one sample.

        `labels[t]` is `tokens[t + 1]` of the row. Where that belongs to another document, or to the
        padding, the stored mask is already 0: it is 0 at every EOD. Padding holds EOD with mask 0, span 0,
        position 0 and document id -1.

        Args:
            epoch: Epoch number from 0.
            index: Sample of the epoch.

        Returns:
            Tensors of shape [S], see `Sample`.

        Raises:
            IndexError: If the epoch has no such sample.
            DataError: If a document is damaged.
        """
        length = self.seq_len
        eod = self.documents.eod
        row = np.full(length + 1, eod, dtype=np.int64)
        loss_mask = np.zeros(length, dtype=np.float32)
        span_id = np.zeros(length, dtype=np.int64)
        position_ids = np.zeros(length, dtype=np.int64)
        doc_id = np.full(length, PADDING, dtype=np.int64)
        start = 0
        for number, document in enumerate(self.documents_of(epoch, index).tolist()):
            tokens, mask, span = self.documents[document]
            stop = start + len(tokens)
            row[start:stop] = tokens
            loss_mask[start:stop] = mask
            span_id[start:stop] = span
            position_ids[start:stop] = np.arange(len(tokens))
            doc_id[start:stop] = number
            start = stop
        return {
            "tokens": torch.from_numpy(row[:-1].copy()),
            "labels": torch.from_numpy(row[1:].copy()),
            "loss_mask": torch.from_numpy(loss_mask),
            "span_id": torch.from_numpy(span_id),
            "position_ids": torch.from_numpy(position_ids),
            "doc_id": torch.from_numpy(doc_id),
        }
