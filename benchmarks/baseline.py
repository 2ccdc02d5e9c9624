"""A training step as it is written without thought of a GPU, as a measure for the others.

The models are those of `reference`, and so are the numbers, but for what makes it slow: attention forms all
S × S scores of a layer, window or not; experts run one after another, as they do in `reference`; and NorMuon
updates one matrix at a time. Nothing is made slow on purpose, and there are no other changes.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch

from trainer.model import gpt
from trainer.model.backends.reference import BACKEND
from trainer.model.core_attention import ReferenceCoreAttention
from trainer.model.document_mask import Documents
from trainer.optim import optimizer
from trainer.optim.matrices import MatrixBatch, plan_matrices

NAME = "baseline"


class WholeScores(ReferenceCoreAttention):
    """Attention that forms the scores of all queries with all keys, and masks those that do not count."""

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Attend; see `ReferenceCoreAttention.forward`."""
        length, batch, heads, dim = query.shape
        share = heads // self.groups
        q = query.float().permute(1, 2, 0, 3) * self.scale  # [B, heads, S, D]
        k, v = (tensor.float().permute(1, 2, 0, 3).repeat_interleave(share, dim=1) for tensor in (key, value))
        scores = q @ k.transpose(-1, -2)
        place = torch.arange(length, device=query.device)
        distance = place[:, None] - place[None, :]
        if self.slopes is not None:
            scores = scores - self.slopes[:, None, None] * distance.clamp(min=0)
        same = documents.doc_id[:, :, None] == documents.doc_id[:, None, :]
        allowed = same & (documents.doc_id >= 0)[:, :, None] & (distance >= 0)
        allowed = allowed | torch.eye(length, dtype=torch.bool, device=query.device)  # padding sees itself
        if self.window is not None:
            allowed = allowed & (distance < self.window)
        scores = scores.masked_fill(~allowed[:, None], -torch.inf)
        assert self.softmax_offset is not None  # of every experiment from vpdense_28 on
        sink = self.softmax_offset.float()[None, :, None, None].expand(batch, heads, length, 1)
        out = torch.softmax(torch.cat((scores, sink), dim=-1), dim=-1)[..., :-1] @ v
        return out.permute(2, 0, 1, 3).reshape(length, batch, heads * dim).to(query.dtype)


def one_by_one(*arguments: Any) -> list[MatrixBatch]:
    """Plan NorMuon's batches with one matrix in each."""
    return plan_matrices(*arguments, chunk_elements=1)


@contextmanager
def built_as_baseline() -> Iterator[None]:
    """Build models and optimizers of `reference` as the baseline's, while the block runs."""
    loaded: Callable[[str], Any] = gpt.load_backend
    planned = optimizer.plan_matrices
    slow = replace(BACKEND, core_attention=WholeScores)
    gpt.load_backend = lambda word: slow if word == "reference" else loaded(word)
    optimizer.plan_matrices = one_by_one  # type: ignore[assignment]
    try:
        yield
    finally:
        gpt.load_backend, optimizer.plan_matrices = loaded, planned  # type: ignore[assignment]
