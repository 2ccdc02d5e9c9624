"""The records of some sequences as bytes: columns apart, each behind its own code.

Cells are taken by k, then by position, because the k-th likeliest ids have statistics of their own; k from
1, 2, 4, 8, … share a column each. The columns, in order:

* numbers of ids, if K is adaptive;
* phases;
* page of every id, group by group; numbers in pages of contexts, group by group, and in others; rank >> 8
  on the wide page;
* gaps between the steps of neighbours, group by group, and what they exceed 255;
* steps of the tails;
* places of the labels, K where a label is not among the ids, and the steps of those labels;
* the draws, if there are any, as ids are.
"""

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.columns import ColumnReader, ColumnWriter
from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.ids import LOCAL, WIDE, IdTable
from trainer.contract.topk.quantise import PHASES, quantise, to_logprobs, to_steps
from trainer.contract.topk.records import TopKRecords

MOST_CELLS = 1 << 25
"""Most ids of a block; bounds what a reader allocates."""
_ESCAPE = 255
_NO_TAIL, _EMPTY_TAIL, _TAIL = 0, 1, 2
"""In the column of tails: none, one of mass zero that was drawn from, and the first of those with a mass."""


def encode(records: TopKRecords, table: IdTable, error: float, adaptive: bool) -> bytes:
    """Return checked records as bytes.

    Args:
        records: Of n positions.
        table: Of the shard, as far as it is known.
        error: Bound of the error of log-probs.
        adaptive: Whether positions may have fewer than K ids.
    """
    columns = ColumnWriter()
    topk = records.ids.shape[1]
    steps, tails, phases = quantise(records.logprobs, records.tail_mass, error)
    present = records.ids >= 0
    counts = present.sum(axis=1)
    if adaptive:
        columns.add_numbers(counts)
    elif not present.all():
        raise StoreError("a position has fewer ids than K, which is fixed; give the store a mass")
    columns.add(phases.astype(np.uint8))

    cells = present.T
    bounds = _bounds(cells.sum(axis=1))
    offsets = np.where(np.arange(topk)[:, None] > 0, table.offsets(records.ids[:, 0]), table.other)
    _add_ids(columns, table, records.ids.T[cells], offsets[cells], bounds)
    gaps = np.diff(steps, axis=1, prepend=0).T[cells]
    for begin, end in bounds:
        columns.add(np.minimum(gaps[begin:end], _ESCAPE).astype(np.uint8))
    columns.add_numbers(gaps[gaps >= _ESCAPE] - _ESCAPE)

    drawn = (records.draws >= 0).all(axis=1) & bool(records.draws.shape[1])
    columns.add_numbers(
        np.where(records.tail_mass > 0, tails + _TAIL, np.where(drawn, _EMPTY_TAIL, _NO_TAIL))
    )
    same = (records.logprobs == records.label_logprob[:, None]) & present
    among = same.any(axis=1)
    columns.add_numbers(np.where(among, same.argmax(axis=1), topk))
    columns.add_numbers(to_steps(records.label_logprob[~among], error))
    if not records.draws.shape[1]:
        return columns.content()
    draws = records.draws[drawn].ravel()
    _add_ids(columns, table, draws, np.full(len(draws), table.other), [(0, len(draws))])
    return columns.content()


def decode(
    payload: memoryview, n: int, topk: int, tail_draws: int, table: IdTable, error: float, adaptive: bool
) -> TopKRecords:
    """Return the records of a block.

    Args:
        payload: What `encode` returned.
        n: Positions.
        topk: K.
        tail_draws: M.
        table: The one that the block was written with.
        error: Bound of the error of log-probs.
        adaptive: Whether positions may have fewer than K ids.

    Raises:
        StoreError: If the bytes are no block of so many positions.
    """
    if n * max(topk, tail_draws) > MOST_CELLS:
        raise StoreError(f"{n} positions of {topk} ids are more than a block has")
    columns = ColumnReader(payload)
    counts = columns.take_numbers(n) if adaptive else np.full(n, topk)
    if n and counts.max() > topk:
        raise StoreError(f"{int(counts.max())} ids, at most {topk}")
    phases = columns.take(n)
    if n and phases.max() >= PHASES:
        raise StoreError(f"phase {int(phases.max())} of {PHASES}")
    cells = None if (counts == topk).all() else np.arange(topk)[:, None] < counts
    bounds = _bounds(np.full(topk, n) if cells is None else cells.sum(axis=1))
    total = bounds[-1][1]

    page, low, wide = _take_pages(columns, bounds, total)
    gaps = np.concatenate([columns.take(end - begin) for begin, end in bounds])
    far = columns.take_numbers(int(np.count_nonzero(gaps == _ESCAPE)))
    tails = columns.take_numbers(n)
    places = columns.take_numbers(n)
    apart = columns.take_numbers(int(np.count_nonzero(places == topk)))

    page, low = _spread(page, cells, topk, n), _spread(low, cells, topk, n)
    ids = np.empty((topk, n), np.int32)
    ids[:1] = table.ids(page[:1], low[:1], table.other, wide[: np.count_nonzero(page[:1] == WIDE)])
    heads = table.offsets(ids[0])
    ids[1:] = table.ids(page[1:], low[1:], heads, wide[np.count_nonzero(page[:1] == WIDE) :])
    steps = gaps.astype(np.int32)
    steps[np.flatnonzero(gaps == _ESCAPE)] += far.astype(np.int32)
    steps = _spread(steps, cells, topk, n)
    for k in range(1, topk):
        steps[k] += steps[k - 1]
    logprobs = to_logprobs(steps, phases, error)
    if cells is not None:
        ids[~cells], logprobs[~cells] = -1, -np.inf

    draws = np.full((n, tail_draws), -1, np.int32)
    if tail_draws:
        drawn = tails > _NO_TAIL
        m = int(drawn.sum()) * tail_draws
        page, low, wide = _take_pages(columns, [(0, m)], m)
        draws[drawn] = table.ids(page, low, table.other, wide).reshape(-1, tail_draws)
    columns.end()
    tail = np.exp(to_logprobs(tails - _TAIL, phases.astype(np.int64), error).astype(np.float64))
    label = np.empty(n, np.float32)
    among = places < topk
    if (places > topk).any() or (places[among] >= counts[among]).any():
        raise StoreError("a label stands behind the last id")
    label[among] = logprobs[places[among], np.flatnonzero(among)]
    label[~among] = to_logprobs(apart, 0, error)
    return TopKRecords(
        label,
        np.ascontiguousarray(ids.T),
        np.ascontiguousarray(logprobs.T),
        np.where(tails >= _TAIL, tail, 0).astype(np.float32),
        draws,
    )


def _bounds(cells: NDArray[np.int64]) -> list[tuple[int, int]]:
    """Return where each group of columns begins and ends among the cells, given how many each k has."""
    topk = len(cells)
    edges = [0, *(1 << power for power in range(topk.bit_length()) if 1 << power < topk), topk]
    ends = np.concatenate([[0], np.cumsum(cells)])
    return [(int(ends[begin]), int(ends[end])) for begin, end in pairwise(edges)]


def _add_ids(
    columns: ColumnWriter,
    table: IdTable,
    ids: NDArray[np.int32],
    offsets: NDArray[np.int32],
    bounds: list[tuple[int, int]],
) -> None:
    page, low, wide = table.pages(ids, offsets)
    for begin, end in bounds:
        columns.add(page[begin:end])
    local = page < LOCAL
    for begin, end in bounds:
        columns.add(low[begin:end][local[begin:end]])
    columns.add(low[~local])
    columns.add_numbers(wide)


def _take_pages(
    columns: ColumnReader, bounds: list[tuple[int, int]], total: int
) -> tuple[NDArray[np.uint8], NDArray[np.uint8], NDArray[np.int64]]:
    page = np.concatenate([columns.take(end - begin) for begin, end in bounds])
    local = page < LOCAL
    found = [columns.take(int(np.count_nonzero(local[begin:end]))) for begin, end in bounds]
    low = np.empty(total, np.uint8)
    low[np.flatnonzero(local)] = np.concatenate(found)  # ten times as fast as by a mask
    low[np.flatnonzero(~local)] = columns.take(total - sum(map(len, found)))
    return page, low, columns.take_numbers(int(np.count_nonzero(page == WIDE)))


def _spread[Number: np.integer](
    values: NDArray[Number], cells: NDArray[np.bool_] | None, topk: int, n: int
) -> NDArray[Number]:
    """Return values as `[K, n]`, zeros where nothing is."""
    if cells is None:
        return values.reshape(topk, n)
    spread = np.zeros((topk, n), values.dtype)
    spread[cells] = values
    return spread
