"""The whole vocabulary's distribution at some positions, boiled down to what is stored of it."""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import SimpleQueue

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from trainer.evaluate.models import LanguageModel
from trainer.teacher.teacher import TeacherScores

_CHUNK_LOGITS = {"cpu": 1 << 23, "cuda": 1 << 28}  # kept at a time: 32 MiB a thread, and 1 GiB, of float32
_TILE = {"cpu": 1 << 13, "cuda": 1 << 16}
"""Columns that are made, searched and summed before the next ones are: on a CPU they stay in the cache."""
_BLOCK = 512
"""Probabilities are summed in blocks of so many tokens, so that a draw reads one block and not all."""
_GROUP = 64
"""Columns of which the largest is found before any is sorted."""
_MANY, _FEW = 1 << 10, 16
"""On a CPU: positions for which the head is laid out anew, and those of a chunk that is made without that."""

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
    desks: SimpleQueue[_Desk] = SimpleQueue()
    tiles = _tiles(model) if model.device.type == "cpu" and len(labels) >= _MANY else None

    def chunk(start: int) -> TeacherScores:
        rows = slice(start, start + size)
        desk = desks.get()
        try:
            logits = desk.fill(model, hidden[rows])
            return _boil_down(logits, labels[rows], topk, mass, None if chances is None else chances[rows])
        finally:
            desks.put(desk)

    starts = range(0, len(labels), size)
    threads = 1 if model.device.type == "cuda" else min(torch.get_num_threads(), len(starts))
    for _ in range(threads):
        # Made once: pages of fresh memory cost a CPU as much as the product itself.
        desks.put(_Desk(model, min(size, len(labels)), tiles))
    chunks = list(map(chunk, starts)) if threads <= 1 else _beside(chunk, starts, threads)
    return concatenate(chunks, topk, 0 if chances is None else chances.shape[1])


def _tiles(model: LanguageModel) -> list[Tensor]:
    """Return the head's weight a tile of columns at a time, float32 `[H, tile]`, as a product reads it.

    Otherwise every product turns it over for itself, for a few positions, in a third of its time.
    """
    weight, _ = model.head
    return [tile.float().t().contiguous() for tile in weight.split(_TILE["cpu"])]


def _beside(
    chunk: Callable[[int], TeacherScores], starts: Sequence[int], threads: int
) -> list[TeacherScores]:
    """Work on chunks in several threads, each with one thread of torch.

    None waits for another at the end of each operation, as torch's own do: on a machine that does something
    else too, most of the time goes there.
    """
    own = torch.get_num_threads()
    try:
        with ThreadPoolExecutor(
            threads, "distributions", initializer=torch.set_num_threads, initargs=(1,)
        ) as pool:
            return list(pool.map(torch.no_grad()(chunk), starts))
    finally:
        torch.set_num_threads(own)  # what threads that begin later take over; those above are gone


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


@dataclass(frozen=True)
class _Logits:
    """The logits of a chunk, and what was found in passing.

    Columns are padded with -inf to whole blocks.

    Attributes:
        values: float32 `[T, blocks × block]`.
        maxima: float32 `[T, groups]`, of neighbouring columns.
        largest: float32 `[T]`, of all.
        sums: float64 `[T, blocks]`, of exp(values - largest).
    """

    values: Tensor
    maxima: Tensor
    largest: Tensor
    sums: Tensor

    def weights(self, blocks: Tensor) -> Tensor:
        """Return exp(values - largest) of some blocks `[T, N]`, float32 `[T, N, block]`."""
        rows = torch.arange(len(blocks), device=blocks.device)[:, None]
        return self.values.unflatten(1, (-1, _BLOCK))[rows, blocks].sub_(self.largest[:, None, None]).exp_()


class _Desk:
    """Memory for the logits of one chunk at a time.

    Args:
        model: Whose logits.
        rows: Most positions of a chunk.
        tiles: Of the head, see `_tiles`; None reads it as the model has it.
    """

    def __init__(self, model: LanguageModel, rows: int, tiles: Sequence[Tensor] | None = None) -> None:
        self.tiles = tiles
        self.width = -(-model.vocab_size // _BLOCK) * _BLOCK
        self.step = min(_TILE[model.device.type], self.width)
        self.values = torch.empty(rows, self.width, device=model.device)
        self.tile = torch.empty(rows * self.step, device=model.device)

    def fill(self, model: LanguageModel, hidden: Tensor) -> _Logits:
        """Compute the logits of some positions `[T, H]`; they are overwritten by the next call."""
        values = self.values[: len(hidden)]
        maxima = torch.empty(len(hidden), self.width // _GROUP, device=values.device)
        sums = torch.empty(len(hidden), self.width // _BLOCK, device=values.device)
        levels = torch.empty_like(sums)
        for start in range(0, self.width, self.step):
            stop = min(start + self.step, self.width)
            made = self.part(model, hidden, start, stop, values[:, start:stop])
            found = maxima[:, start // _GROUP : stop // _GROUP]
            torch.amax(made.unflatten(1, (-1, _GROUP)), dim=2, out=found)
            # Of its own for every tile: the largest of all is not known yet. It is finite where all are -inf.
            level = found.amax(dim=1, keepdim=True).clamp_(min=torch.finfo(torch.float32).min)
            blocks = slice(start // _BLOCK, stop // _BLOCK)
            tile = self.tile[: made.numel()].view(made.shape)
            torch.sub(made, level, out=tile).exp_()
            sums[:, blocks] = tile.unflatten(1, (-1, _BLOCK)).sum(dim=2)
            levels[:, blocks] = level
        largest = maxima.amax(dim=1)
        return _Logits(
            values, maxima, largest, sums.double().mul_((levels.double() - largest[:, None].double()).exp_())
        )

    def part(self, model: LanguageModel, hidden: Tensor, start: int, stop: int, out: Tensor) -> Tensor:
        """Compute some columns into `out`, `[T, stop - start]`, and return it."""
        kept = min(stop, model.vocab_size)
        made, columns = out[:, : kept - start], slice(start, kept)
        if self.tiles is None or len(hidden) < _FEW:
            model.head_logits(hidden, out=made, columns=columns)
        else:
            torch.mm(hidden.float(), self.tiles[start // self.step], out=made)
            if (bias := model.head[1]) is not None:
                made.add_(bias[columns].float())
        out[:, kept - start :] = -torch.inf
        return out


def _boil_down(
    logits: _Logits, labels: Tensor, topk: int, mass: float | None, chances: Uniforms | None
) -> TeacherScores:
    """Return what is stored of logits, whose listed values are overwritten."""
    at_label = logits.values.gather(1, labels[:, None])[:, 0].double()
    largest = logits.largest[:, None]
    best, ids = _largest(logits, topk)
    total = logits.sums.sum(dim=1)
    log_total = total.log()
    listed = (best - largest).double()
    kept = torch.ones_like(ids, dtype=torch.bool)
    if mass is not None:
        # On the CPU: a GPU's running sum is not the same from call to call.
        reached = listed.exp().cpu().cumsum(dim=1).to(total.device) / total[:, None]
        kept[:, 1:] = reached[:, :-1] < mass
    blocks = _without(logits, ids, best.masked_fill(kept, -torch.inf))
    tail = blocks.sum(dim=1)
    draws = np.empty((len(labels), 0), dtype=np.int32)
    if chances is not None:
        draws = _draw(logits, blocks.cpu().numpy(), chances)
    logprobs = (listed - log_total[:, None]).clamp_(max=0.0).masked_fill_(~kept, -torch.inf)
    label = at_label - logits.largest.double() - log_total
    return TeacherScores(
        label.clamp_(max=0.0).float().cpu().numpy(),
        ids.masked_fill(~kept, -1).int().cpu().numpy(),
        logprobs.float().cpu().numpy(),
        (tail / total).float().clamp_(0.0, 1.0).cpu().numpy(),
        draws,
    )


def _largest(logits: _Logits, topk: int) -> tuple[Tensor, Tensor]:
    """Return the largest numbers of each row and where they stand, `[T, K]`, largest first.

    They all lie in the K groups of columns with the largest maxima, so the rest is not sorted: on a CPU that
    takes a quarter of the time of `topk` over the vocabulary.
    """
    values, maxima = logits.values, logits.maxima
    if topk * 4 > maxima.shape[1]:
        return values.topk(topk, dim=1)
    groups = maxima.topk(topk, dim=1).indices
    rows = torch.arange(len(values), device=values.device)[:, None]
    best, place = values.unflatten(1, (-1, _GROUP))[rows, groups].flatten(1).topk(topk, dim=1)
    return best, groups.gather(1, place // _GROUP) * _GROUP + place % _GROUP


def _without(logits: _Logits, ids: Tensor, instead: Tensor) -> Tensor:
    """Overwrite values, and return the sums of all blocks, float64: those that are touched are made anew.

    What is left of a block is summed, not what was taken off subtracted: it may be as small as round-off.

    Args:
        logits: Whose values are overwritten.
        ids: int64 `[T, K]`, where.
        instead: float32 `[T, K]`, what with.
    """
    logits.values.scatter_(1, ids, instead)
    blocks = logits.sums.shape[1]
    touched = ids // _BLOCK
    if ids.shape[1] > blocks:
        touched = torch.arange(blocks, device=ids.device).expand(len(ids), -1)
    return logits.sums.scatter(1, touched, logits.weights(touched).sum(dim=2).double())


def _draw(logits: _Logits, blocks: NDArray[np.float64], chances: Uniforms) -> NDArray[np.int32]:
    """Draw tokens by inverting the distribution function: first the block, then the token in it.

    Args:
        logits: -inf outside the tail.
        blocks: float64 `[T, blocks]`, the sums of their weights.
        chances: float64 `[T, M]`.

    Returns:
        int32 `[T, M]`; -1 where nothing has weight.
    """
    ends = blocks.cumsum(axis=1)
    aims = chances * ends[:, -1:]
    block = np.minimum((ends[:, None, :] <= aims[:, :, None]).sum(axis=2), _last(blocks)[:, None])
    chosen = torch.from_numpy(block).to(logits.values.device)
    entries = logits.weights(chosen).double().cpu().numpy()  # [T, M, block]
    steps = entries.cumsum(axis=2)
    before = np.take_along_axis(ends - blocks, block, axis=1)
    with np.errstate(invalid="ignore"):  # 0 / 0 where nothing has weight
        share = (aims - before) / np.take_along_axis(blocks, block, axis=1)
        place = (steps <= (share.clip(0.0) * steps[:, :, -1])[:, :, None]).sum(axis=2)
    drawn = block * _BLOCK + np.minimum(place, _last(entries))
    return np.where(ends[:, -1:] > 0, drawn, -1).astype(np.int32)


def _last(weights: NDArray[np.float64]) -> NDArray[np.int64]:
    """Return the place of the last that is not 0, along the last axis: rounding may point past it."""
    return weights.shape[-1] - 1 - (weights[..., ::-1] > 0).argmax(axis=-1)
