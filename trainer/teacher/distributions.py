"""The whole vocabulary's distribution at some positions, boiled down to what is stored of it."""

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluate.models import LanguageModel
from trainer.teacher.teacher import TeacherScores

_CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits alive at a time: 64 MiB and 1 GiB of float32
_BLOCK = 512
"""Probabilities are summed in blocks of so many tokens, so that a draw reads one block and not all."""
_GROUP = 64
"""Columns of which the largest is found before any is sorted."""

Uniforms = NDArray[np.float64]


def uniforms(keys: Sequence[int], counts: Sequence[int], draws: int) -> Uniforms:
    """Return the numbers in [0, 1) that decide the draws, by counter: row i of a key is the same in any call.

    Only raw words of Philox are used, which NumPy promises never to change.

    Args:
        keys: One of 128 bits for each sequence.
        counts: Rows of each sequence.
        draws: Numbers a row, M.

    Returns:
        float64 `[sum(counts), M]`.
    """
    word = (1 << 64) - 1
    made = [
        np.asarray(
            np.random.Philox(key=np.array([key & word, key >> 64 & word], dtype=np.uint64)).random_raw(
                count * draws
            ),
            dtype=np.uint64,
        )
        for key, count in zip(keys, counts, strict=True)
        if count
    ]
    words = np.concatenate(made) if made else np.empty(0, dtype=np.uint64)
    return ((words >> np.uint64(11)).astype(np.float64) * 2.0**-53).reshape(-1, draws)


@torch.no_grad()
def distributions(
    model: LanguageModel,
    hidden: Tensor,
    labels: Tensor,
    topk: int,
    *,
    mass: float | None = None,
    chances: Uniforms | None = None,
) -> TeacherScores:
    """Score labels, list the likeliest tokens, and draw from the rest, a chunk of positions at a time.

    Sums over the vocabulary are made in float32 inside a block and float64 between blocks. The tail's mass is
    the sum of its own probabilities, so it is exact where it is small.

    Args:
        model: Has the output head.
        hidden: `[T, H]`, final hidden states.
        labels: int64 `[T]`.
        topk: Tokens to list, K.
        mass: List as many as have this probability together; all K by default.
        chances: float64 `[T, M]` in [0, 1): the draws; none by default.

    Returns:
        Of T positions.
    """
    size = max(1, _CHUNK_LOGITS[model.device.type] // model.vocab_size)
    labels = labels.to(model.device)
    # One buffer for all chunks: pages of fresh memory cost a CPU as much as the product itself.
    buffer = torch.empty(min(size, len(labels)), model.vocab_size, device=model.device)
    chunks = []
    for start in range(0, len(labels), size):
        wanted = labels[start : start + size]
        logits = model.head_logits(hidden[start : start + size], out=buffer[: len(wanted)])
        here = None if chances is None else chances[start : start + size]
        chunks.append(_chunk(logits, wanted, topk, mass, here))
    return concatenate(chunks, topk, 0 if chances is None else chances.shape[1])


def concatenate(parts: Sequence[TeacherScores], topk: int, draws: int) -> TeacherScores:
    """Join scores; of nothing they are those of no position."""
    if not parts:
        return TeacherScores.of_nothing(topk, draws)
    return TeacherScores(
        *(
            np.concatenate([getattr(part, name) for part in parts])
            for name in ("label_logprob", "ids", "logprobs", "tail_mass", "draws")
        )
    )


def _chunk(
    logits: Tensor, labels: Tensor, topk: int, mass: float | None, chances: Uniforms | None
) -> TeacherScores:
    """Boil down float32 logits `[T, V]`, which are overwritten."""
    at_label = logits.gather(1, labels[:, None])[:, 0]
    if topk:
        best, ids = _largest(logits, topk)
        largest = best[:, 0]
    else:
        largest = logits.amax(dim=1)
        best, ids = logits.new_empty(len(logits), 0), labels.new_empty(len(logits), 0)
    weights = logits.sub_(largest[:, None]).exp_()  # in place: a second buffer costs as much as the product
    total = _block_sums(weights).sum(dim=1)
    log_total = total.log()
    listed = (best - largest[:, None]).double()
    kept = torch.ones_like(ids, dtype=torch.bool)
    if mass is not None:
        # On the CPU: a GPU's running sum is not the same from call to call.
        reached = listed.exp().cpu().cumsum(dim=1).to(total.device) / total[:, None]
        kept[:, 1:] = reached[:, :-1] < mass
    weights.scatter_(1, ids, weights.gather(1, ids).masked_fill_(kept, 0.0))
    blocks = _block_sums(weights)
    tail = blocks.sum(dim=1)
    draws = np.empty((len(logits), 0), dtype=np.int32)
    if chances is not None:
        draws = _draw(weights, blocks.cpu().numpy(), chances)
    logprobs = (listed - log_total[:, None]).clamp_(max=0.0).masked_fill_(~kept, -torch.inf)
    label = at_label.double() - largest.double() - log_total
    return TeacherScores(
        label.clamp_(max=0.0).float().cpu().numpy(),
        ids.masked_fill(~kept, -1).int().cpu().numpy(),
        logprobs.float().cpu().numpy(),
        (tail / total).float().clamp_(0.0, 1.0).cpu().numpy(),
        draws,
    )


def _largest(logits: Tensor, topk: int) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of each row and where they stand, `[T, K]`, largest first.

    They all lie in the K groups of columns with the largest maxima, so the rest is not sorted: on a CPU that
    takes a quarter of the time of `topk` over the vocabulary.
    """
    rows, columns = logits.shape
    whole = columns // _GROUP * _GROUP
    if topk * _GROUP * 4 > whole:
        return logits.topk(topk, dim=1)
    groups = logits[:, :whole].unflatten(1, (whole // _GROUP, _GROUP)).amax(dim=2).topk(topk, dim=1).indices
    inside = torch.arange(_GROUP, device=logits.device)
    rest = torch.arange(whole, columns, device=logits.device).expand(rows, -1)
    candidates = torch.cat([(groups[:, :, None] * _GROUP + inside).flatten(1), rest], dim=1)
    best, place = logits.gather(1, candidates).topk(topk, dim=1)
    return best, candidates.gather(1, place)


def _block_sums(weights: Tensor) -> Tensor:
    """Return float64 `[T, ceil(V / block)]`, sums of neighbouring columns."""
    columns = weights.shape[1]
    whole = columns // _BLOCK * _BLOCK
    sums = weights[:, :whole].unflatten(1, (whole // _BLOCK, _BLOCK)).sum(dim=2) if whole else None
    rest = weights[:, whole:].sum(dim=1, keepdim=True) if whole < columns else None
    parts = [part for part in (sums, rest) if part is not None]
    return torch.cat(parts, dim=1).double()


def _draw(weights: Tensor, blocks: NDArray[np.float64], chances: Uniforms) -> NDArray[np.int32]:
    """Draw tokens by inverting the distribution function: first the block, then the token in it.

    Args:
        weights: float32 `[T, V]`, not normalised, zero outside the tail.
        blocks: float64 `[T, ceil(V / block)]`, their sums.
        chances: float64 `[T, M]`.

    Returns:
        int32 `[T, M]`; -1 where nothing has weight.
    """
    ends = blocks.cumsum(axis=1)
    drawn = np.full(chances.shape, -1, dtype=np.int32)
    alive = np.flatnonzero(ends[:, -1] > 0)
    if not len(alive) or not chances.shape[1]:
        return drawn
    aims = chances[alive] * ends[alive, -1:]
    block = np.stack(
        [_first_beyond(ends[row], blocks[row], aim) for row, aim in zip(alive, aims, strict=True)]
    )
    columns = block[:, :, None] * _BLOCK + np.arange(_BLOCK)  # [R, M, block]
    inside = columns < weights.shape[1]
    rows = torch.from_numpy(alive).to(weights.device)[:, None, None]
    index = torch.from_numpy(np.where(inside, columns, 0)).to(weights.device)
    entries = np.where(inside, weights[rows, index].double().cpu().numpy(), 0.0)
    steps = entries.cumsum(axis=2)
    before = np.take_along_axis(ends[alive] - blocks[alive], block, axis=1)
    share = (aims - before) / np.take_along_axis(blocks[alive], block, axis=1)
    place = (steps <= (share.clip(0.0) * steps[:, :, -1])[:, :, None]).sum(axis=2)
    last = _BLOCK - 1 - (entries[:, :, ::-1] > 0).argmax(axis=2)  # where rounding went past the end
    drawn[alive] = block * _BLOCK + np.minimum(place, last)
    return drawn


def _first_beyond(
    ends: NDArray[np.float64], blocks: NDArray[np.float64], aims: NDArray[np.float64]
) -> NDArray[np.int64]:
    """Return the first blocks that end beyond the aims; the last with weight where rounding left none."""
    last = int(np.flatnonzero(blocks > 0)[-1])
    return np.minimum(np.searchsorted(ends, aims, side="right"), last)
