# mypy: disable-error-code="no-untyped-def"
"""The kernel of `trainer.model.pair_sort`, in a module of its own: importing Triton takes a while."""

import triton
import triton.language as tl


@triton.jit
def count_and_place(
    chosen, order, inverse, expert, offsets, pairs, experts, BLOCKS: tl.constexpr, BLOCK: tl.constexpr
):
    """Program e: count the pairs below e, then give those of e their rows, in order."""
    e = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    below = 0
    for block in range(BLOCKS):
        at = block * BLOCK + columns
        found = tl.load(chosen + at, mask=at < pairs, other=experts + 1)
        below += tl.sum((found < e).to(tl.int32))
    row = below
    for block in range(BLOCKS):
        at = block * BLOCK + columns
        found = tl.load(chosen + at, mask=at < pairs, other=experts + 1)
        mine = found == e
        rows = (row + tl.cumsum(mine.to(tl.int32)) - 1).to(tl.int64)
        tl.store(order + rows, at.to(tl.int64), mask=mine)
        tl.store(inverse + at, rows, mask=mine)
        tl.store(expert + rows, tl.minimum(e, experts - 1).to(tl.int64) + at * 0, mask=mine)
        row += tl.sum(mine.to(tl.int32))
    if e < experts:
        tl.store(offsets + e, row)
