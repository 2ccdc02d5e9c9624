"""Mock conversations, made as they are asked for: nothing to read, and every profile sees the same."""

import hashlib

import numpy as np
import torch

from trainer.contract.kinds import CONVERSATIONS
from trainer.data.kd import Sample
from trainer.model.document_mask import PADDING
from trainer.train.inputs import DataPart, TrainingData

_SAMPLES = 4096
_SHORTEST, _LONGEST = 64, 768
_PROMPT, _REASONING = 0.2, 0.6
"""Shares of a conversation; the rest is its answer."""


class MockConversations:
    """Rows of whole conversations of random tokens, with padding where the last one does not fit.

    Args:
        seq_len: Tokens of a row.
        vocab_size: Ids are drawn from all of them.
        seed: Of what is drawn.
    """

    def __init__(self, seq_len: int, vocab_size: int, seed: int) -> None:
        self._seq_len, self._vocab_size, self._seed = seq_len, vocab_size, seed

    def num_samples(self, epoch: int) -> int:
        """Sample in an epoch."""
        return _SAMPLES

    def pack_index_sha256(self, epoch: int) -> str:
        """Identity of an epoch's order."""
        return hashlib.sha256(f"{self._seed} {self._seq_len} {self._vocab_size} {epoch}".encode()).hexdigest()

    def fill_ratio(self, epoch: int) -> float:
        """Share of the first sample's positions that hold a document's tokens."""
        return float((self.sample(epoch, 0)["doc_id"] != PADDING).float().mean())

    def describe(self, epoch: int, index: int) -> str:
        """Name a sample for a person."""
        return f"mock sample {index} of epoch {epoch}"

    def sample(self, epoch: int, index: int) -> Sample:
        """Make a sample; tensors [S], see `trainer.data.kd.Sample`."""
        rng = np.random.default_rng((self._seed, epoch, index))
        length = self._seq_len
        row = rng.integers(0, self._vocab_size, length + 1)
        loss_mask = np.zeros(length, dtype=np.float32)
        span_id, position_ids = (np.zeros(length, dtype=np.int64) for _ in range(2))
        doc_id = np.full(length, PADDING, dtype=np.int64)
        start = number = 0
        longest = min(_LONGEST, length // 2)
        while (size := int(rng.integers(min(_SHORTEST, longest // 2), longest))) <= length - start:
            prompt, reasoning = int(size * _PROMPT), int(size * _REASONING)
            stop = start + size
            span_id[start + prompt : start + prompt + reasoning] = 1
            span_id[start + prompt + reasoning : stop - 1] = 2
            loss_mask[start + prompt : stop - 1] = 1  # the last token's label is another conversation's
            position_ids[start:stop] = np.arange(size)
            doc_id[start:stop] = number
            start, number = stop, number + 1
        return {
            "tokens": torch.from_numpy(row[:-1].copy()),
            "labels": torch.from_numpy(row[1:].copy()),
            "loss_mask": torch.from_numpy(loss_mask),
            "span_id": torch.from_numpy(span_id),
            "position_ids": torch.from_numpy(position_ids),
            "doc_id": torch.from_numpy(doc_id),
        }


def mock_data(seq_len: int, vocab_size: int, seed: int) -> TrainingData:
    """Return open data of mock conversations alone."""
    train, valid = (MockConversations(seq_len, vocab_size, seed + split) for split in (0, 1))
    return TrainingData({CONVERSATIONS: DataPart(train, valid, 1.0, {})})
