"""Conversations that a teacher has scored, packed alone, each token beside what the teacher said of it.

The data set holds the conversations and the top-K store the records; both are addressed by split, shard and
number in the shard, so a place in the packing is a place in the store. The store's index says which
conversations these are. That they are the right ones (all of the validation split, and of the training split
those that `scored_sequence` names) is verified on opening for `PROBES` conversations of every shard, evenly
spread, and for the whole data set by the check of the store's asset: reading all tokens of billions at every
start would take longer than many a run.
"""

import hashlib
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.contract.canonical import sha256_json
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.subset import scored_sequence
from trainer.data.indexed import SPAN_REASONING, SPAN_SCORED_REASONING, SpanDocument, SpanDocuments
from trainer.data.kd import PackedDataset, Sample
from trainer.data.sampler import FILLERS
from trainer.errors import DataError

PROBES = 512
"""Conversations of a shard whose membership in the subset is verified when it is opened."""

_FIELDS: Mapping[str, tuple[str, Any]] = {
    "teacher_ids": ("ids", np.int64),
    "teacher_logprobs": ("logprobs", np.float32),
    "teacher_tail": ("tail_mass", np.float32),
    "teacher_draws": ("draws", np.int64),
    "teacher_label_logprob": ("label_logprob", np.float32),
}
"""Of each field of a sample: what it is called in the records, and its type in the sample."""


class ScoredDocuments:
    """The scored conversations of one split, as one list.

    Attributes:
        eod: End-of-document token id.
        numbers: Number of each in the whole split [n] int64, ascending.
        lengths: Tokens of each [n] int32.
    """

    def __init__(self, documents: SpanDocuments, store: TopKStore, split: str, fraction: float):
        """Find the scored conversations of a split and verify that they are those that should be.

        Args:
            documents: The whole split.
            store: The store, made for this data set.
            split: `"train"` or `"valid"`.
            fraction: Share of the training split that is scored.

        Raises:
            DataError: A conversation that should have records has none, one that should not has some, or
                there are none at all. The message names shard and sequence.
            StoreError: A shard of the store is damaged.
        """
        self._documents, self._store, self._split, self._fraction = documents, store, split, fraction
        if foreign := sorted(set(store.shards(split)) - set(documents.shards)):
            raise DataError(
                f"{store.root} has shard {foreign[0]} of {split!r}, which the data set lacks; it was made "
                "for another data set"
            )
        found = [self._scored(shard, place) for shard, place in documents.shards.items()]
        self.numbers: NDArray[np.int64] = np.concatenate(found)
        if not len(self.numbers):
            raise DataError(
                f"{store.root} has no records of the {split!r} split: subset_fraction = {fraction} of "
                f"{len(documents)} conversations is none; raise it, or take more rows"
            )
        self.eod = documents.eod
        self.lengths: NDArray[np.int32] = documents.lengths[self.numbers]

    def _scored(self, shard: int, place: range) -> NDArray[np.int64]:
        """Return the numbers, in the split, of a shard's conversations that have records."""
        there = shard in self._store.shards(self._split)
        sequences = self._store.sequences(self._split, shard) if there else np.empty(0, np.int64)
        if len(sequences) and sequences[-1] >= len(place):
            raise DataError(
                f"{self._store.root} has records of sequence {sequences[-1]} of shard {shard} of "
                f"{self._split!r}, which has {len(place)}; it was made for another data set"
            )
        probes = np.unique(np.linspace(0, len(place) - 1, num=min(len(place), PROBES)).astype(np.int64))
        if self._split == "valid":
            probes = np.arange(len(place))
        scored = np.isin(probes, sequences, assume_unique=True)
        for sequence, has in zip(probes.tolist(), scored.tolist(), strict=True):
            if self._wanted(place[sequence]) != has:
                what = "has records, and should have none" if has else "has no records"
                raise DataError(
                    f"{self._store.root}: sequence {sequence} of shard {shard} of {self._split!r} {what} "
                    f"(subset_fraction = {self._fraction}); score the data set again"
                )
        return place.start + sequences

    def _wanted(self, document: int) -> bool:
        return self._split == "valid" or scored_sequence(self._documents[document].tokens, self._fraction)

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, document: int) -> SpanDocument:
        """Read one conversation; its spans are those of scored conversations.

        Raises:
            IndexError: There is no such document.
            DataError: It is damaged.
        """
        tokens, mask, span = self._documents[int(self.numbers[document])]
        return SpanDocument(tokens, mask, np.where(span > 0, span + _RELABEL, span))

    def records(self, document: int, supervised: int) -> TopKRecords:
        """Read what the teacher said of one conversation.

        Args:
            document: Its number here.
            supervised: Its supervised tokens.

        Raises:
            DataError: There are more or fewer records than these.
            StoreError: The block that holds them is damaged.
        """
        shard, sequence = self._documents.place(int(self.numbers[document]))
        records = self._store.read(self._split, shard, sequence)
        if len(records) != supervised:
            raise DataError(
                f"{self._store.root} has {len(records)} records of sequence {sequence} of shard {shard} of "
                f"{self._split!r}, which has {supervised} supervised tokens; score the data set again"
            )
        return records

    def describe(self, document: int) -> str:
        """Name a conversation for a person: its place in its file."""
        return self._documents.describe(int(self.numbers[document]))

    @cached_property
    def lengths_sha256(self) -> str:
        """Digest of the lengths, int32 little endian: all that packing depends on."""
        return hashlib.sha256(np.ascontiguousarray(self.lengths, dtype="<i4")).hexdigest()

    @cached_property
    def identity(self) -> str:
        """Digest of what the samples are made of beside their order: the store, to the last record."""
        return sha256_json(self._store.manifest)


_RELABEL = SPAN_SCORED_REASONING - SPAN_REASONING


class ScoredDataset(PackedDataset):
    """Samples of scored conversations: tokens as in `PackedDataset`, and the teacher's records of them."""

    def __init__(self, documents: ScoredDocuments, *, seq_len: int, block: int, seed: int, cache_dir: Path):
        """Hold the documents, see `PackedDataset`."""
        super().__init__(documents, seq_len=seq_len, block=block, seed=seed, cache_dir=cache_dir)
        self._scored = documents

    def pack_index_sha256(self, epoch: int) -> str:
        """Identity of an epoch's samples: their order, and the store that their records come from."""
        text = f"{super().pack_index_sha256(epoch)} {self._scored.identity}"
        return hashlib.sha256(text.encode("ascii")).hexdigest()

    def sample(self, epoch: int, index: int) -> Sample:
        """Make one sample.

        Args:
            epoch: Epoch number from 0.
            index: Sample of the epoch.

        Returns:
            The fields of `PackedDataset.sample`, and label-aligned like `loss_mask`, with `FILLERS` where
            that is 0: `teacher_ids` [S, K] and `teacher_draws` [S, M] int64, `teacher_logprobs` [S, K],
            `teacher_tail` [S] and `teacher_label_logprob` [S] float32.

        Raises:
            IndexError: If the epoch has no such sample.
            DataError: A document is damaged, or has not the records that it should have.
            StoreError: A block of the store is damaged.
        """
        sample = super().sample(epoch, index)
        mask, rows = sample["loss_mask"].numpy() > 0, sample["doc_id"].numpy()
        fields: dict[str, NDArray[Any]] = {}
        for number, document in enumerate(self.documents_of(epoch, index).tolist()):
            places = np.flatnonzero(mask & (rows == number))
            records = self._scored.records(document, len(places))
            for name, (of, dtype) in _FIELDS.items():
                values = getattr(records, of)
                if name not in fields:
                    fields[name] = np.full((len(mask), *values.shape[1:]), FILLERS[name], dtype=dtype)
                fields[name][places] = values
        return sample | {name: torch.from_numpy(values) for name, values in fields.items()}
