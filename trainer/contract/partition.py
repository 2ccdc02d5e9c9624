"""Which rank owns which part of which parameter.

The unit of NorMuon is a whole matrix (one expert of a stack), because orthogonalisation needs all of it;
AdamW is element-wise, so large tables are split by rows. A rank owns one contiguous range of a parameter's
leading axis, which keeps every part a view. The plan is a function of shapes and order alone and so is the
same on every rank.
"""

import heapq
from collections.abc import Sequence
from dataclasses import dataclass

#: AdamW tensors of at least this many elements are split by rows, smaller ones stay whole.
SPLIT_ELEMENTS = 1 << 20


@dataclass(frozen=True)
class Unit:
    """What the plan needs to know about one parameter.

    Attributes:
        rows: Length of the leading axis along which it may be split; 1 for what must stay whole.
        cost: Work or memory of one row.
        even: Split all rows evenly over the ranks instead of one row at a time to the least loaded rank.
    """

    rows: int
    cost: int
    even: bool = False


@dataclass(frozen=True)
class Share:
    """Rows `[start, stop)` of unit `unit`, owned by rank `owner`."""

    unit: int
    start: int
    stop: int
    owner: int


def matrix_unit(shape: Sequence[int], tensor_parallel_size: int = 1) -> Unit:
    """Return the cost of a matrix `[m, n]` or a stack `[E, m, n]`: of its Gram products, m·n·min(m, n).

    Args:
        shape: Local shape.
        tensor_parallel_size: Number of ranks the matrix is split over; scales its cost the same way on each
            of them.
    """
    *batch, m, n = shape
    return Unit(rows=batch[0] if batch else 1, cost=m * n * min(m, n) * tensor_parallel_size)


def elementwise_unit(shape: Sequence[int], split_elements: int = SPLIT_ELEMENTS) -> Unit:
    """Return a tensor for AdamW; cost is its number of elements."""
    elements = 1
    for size in shape:
        elements *= size
    if len(shape) >= 2 and elements >= split_elements:
        return Unit(rows=shape[0], cost=elements // shape[0], even=True)
    return Unit(rows=1, cost=elements)


def plan(units: Sequence[Unit], ranks: int) -> list[Share]:
    """Share units out over ranks: the dearest rows first, each to the rank with the least work so far.

    Args:
        units: In the order of the model's parameters.
        ranks: Size of the group.

    Returns:
        Shares ordered by unit and then by owner; together they cover every row exactly once.
    """
    load = [(0, rank) for rank in range(ranks)]
    counts = [[0] * ranks for _ in units]
    for index in sorted(range(len(units)), key=lambda index: (-units[index].cost, index)):
        unit = units[index]
        if unit.even:
            for rank in range(ranks):
                counts[index][rank] = unit.rows * (rank + 1) // ranks - unit.rows * rank // ranks
            load = [(work + counts[index][rank] * unit.cost, rank) for work, rank in load]
            heapq.heapify(load)
            continue
        for _ in range(unit.rows):
            work, rank = load[0]
            counts[index][rank] += 1
            heapq.heapreplace(load, (work + unit.cost, rank))
    shares = []
    for index, per_rank in enumerate(counts):
        start = 0
        for rank, count in enumerate(per_rank):
            if count:
                shares.append(Share(index, start, start + count, rank))
                start += count
    return shares
