# mypy: disable-error-code="no-untyped-def"
"""The kernels of `trainer.model.grouped_products`, in a module of their own: importing Triton takes a while.

Rows are sorted by expert; `offsets` says where each expert's rows end, and rows past the last belong to
nobody: none of these kernels writes them. Operands are gathered while they are read: row r of a product is
row `order[r] // TOPK` of what stands there for each token. Sums run in a fixed order.
"""

import triton
import triton.language as tl


@triton.jit
def _rows_of(offsets, tile, EXPERTS: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr):
    """Return the expert of the tile-th block of rows, its first row, and where that expert's rows end.

    Blocks are counted through all experts, and no block has rows of two. Past the last one, both are 0.
    """
    e = tl.arange(0, PADDED)
    ends = tl.load(offsets + e, mask=e < EXPERTS, other=0)
    starts = tl.load(offsets + e - 1, mask=(e > 0) & (e < EXPERTS), other=0)
    tiles = tl.where(e < EXPERTS, (ends - starts + ROWS - 1) // ROWS, 0)
    before = tl.cumsum(tiles) - tiles
    mine = (before <= tile) & (tile < before + tiles)
    expert = tl.sum(tl.where(mine, e, 0))
    first = tl.sum(tl.where(mine, starts + (tile - before) * ROWS, 0))
    return expert, first, tl.sum(tl.where(mine, ends, 0))


@triton.jit
def _weighted(inner, bias, column, p, WIDTH: tl.constexpr, BIASED: tl.constexpr):
    """Return `v = relu(inner + bias)` and `p v²`, both fp32."""
    value = inner.to(tl.float32)
    if BIASED:
        value += tl.load(bias + column, mask=column < WIDTH, other=0.0).to(tl.float32)[None, :]
    value = tl.maximum(value, 0.0)
    return value, value * value * p[:, None]


@triton.jit
def inner_rows(
    tokens, weight, bias, weights, order, offsets, inner, weighted,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr,
    PADDED: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`inner = W₁ z`, `[n, F]`, and `p relu(inner + b₁)²`, of each row's expert and token."""
    expert, first, end = _rows_of(offsets, tl.program_id(0), EXPERTS, PADDED, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    live = row < end
    pair = tl.load(order + row, mask=live, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = tokens + (pair // TOPK)[:, None] * HIDDEN
    right = weight + expert.to(tl.int64) * (WIDTH * HIDDEN) + column[None, :] * HIDDEN
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, HIDDEN, DEPTH):
        k = at + depth
        a = tl.load(left + k[None, :], mask=live[:, None] & (k < HIDDEN)[None, :], other=0.0)
        b = tl.load(right + k[:, None], mask=(k < HIDDEN)[:, None] & (column < WIDTH)[None, :], other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    kept = total.to(inner.dtype.element_ty)
    p = tl.load(weights + pair, mask=live, other=0.0)
    _, value = _weighted(kept, bias + expert * WIDTH, column, p, WIDTH, BIASED)
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = live[:, None] & (column < WIDTH)[None, :]
    tl.store(inner + place, kept, mask=inside)
    tl.store(weighted + place, value.to(weighted.dtype.element_ty), mask=inside)


@triton.jit
def outer_rows(
    rows, weight, offsets, out, STEP_K: tl.constexpr, STEP_N: tl.constexpr,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, EXPERTS: tl.constexpr, PADDED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """`[n, F]` to `[n, H]` by each row's expert, in whose matrix F has the stride `STEP_K` and H `STEP_N`."""
    expert, first, end = _rows_of(offsets, tl.program_id(0), EXPERTS, PADDED, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    live = row < end
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = rows + row.to(tl.int64)[:, None] * WIDTH
    right = weight + expert.to(tl.int64) * (WIDTH * HIDDEN) + column[None, :] * STEP_N
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, WIDTH, DEPTH):
        k = at + depth
        a = tl.load(left + k[None, :], mask=live[:, None] & (k < WIDTH)[None, :], other=0.0)
        inside = (k < WIDTH)[:, None] & (column < HIDDEN)[None, :]
        b = tl.load(right + k[:, None] * STEP_K, mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    place = row.to(tl.int64)[:, None] * HIDDEN + column[None, :]
    inside = live[:, None] & (column < HIDDEN)[None, :]
    tl.store(out + place, total.to(out.dtype.element_ty), mask=inside)


@triton.jit
def inner_gradients(
    grad, weight, inner, bias1, of_bias2, weights, order, offsets, to_inner, weighted, to_pairs, n,
    HIDDEN: tl.constexpr, WIDTH: tl.constexpr, TOPK: tl.constexpr, EXPERTS: tl.constexpr,
    PADDED: tl.constexpr, BIASED: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """From the tokens' gradients `[T, H]` to those of `inner` `[n, F]`, and a share of those of p.

    Writes once more what `inner_rows` called `weighted`. `to_pairs` is `[F / COLUMNS, n]`: p's gradient is
    the sum over the blocks of columns. `of_bias2` is fp32 `[T, E]`, each token's gradient times each b₂.
    """
    expert, first, end = _rows_of(offsets, tl.program_id(0), EXPERTS, PADDED, ROWS)
    if first >= end:
        return
    row = first + tl.arange(0, ROWS)
    live = row < end
    pair = tl.load(order + row, mask=live, other=0)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    left = grad + (pair // TOPK)[:, None] * HIDDEN
    right = weight + expert.to(tl.int64) * (WIDTH * HIDDEN) + column[None, :]
    total = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)
    for at in range(0, HIDDEN, DEPTH):
        k = at + depth
        a = tl.load(left + k[None, :], mask=live[:, None] & (k < HIDDEN)[None, :], other=0.0)
        inside = (k < HIDDEN)[:, None] & (column < WIDTH)[None, :]
        b = tl.load(right + k[:, None] * WIDTH, mask=inside, other=0.0)
        total = tl.dot(a, b, total, input_precision="ieee")
    place = row.to(tl.int64)[:, None] * WIDTH + column[None, :]
    inside = live[:, None] & (column < WIDTH)[None, :]
    p = tl.load(weights + pair, mask=live, other=0.0)
    value, again = _weighted(
        tl.load(inner + place, mask=inside, other=0.0), bias1 + expert * WIDTH, column, p, WIDTH, BIASED
    )
    of_p = tl.sum(total * value * value, axis=1)
    if BIASED and tl.program_id(1) == 0:
        of_p += tl.load(of_bias2 + (pair // TOPK) * EXPERTS + expert, mask=live, other=0.0)
    tl.store(to_pairs + tl.program_id(1) * n + row, of_p, mask=live)
    tl.store(weighted + place, again.to(weighted.dtype.element_ty), mask=inside)
    back = total * p[:, None] * 2.0 * value
    tl.store(to_inner + place, back.to(to_inner.dtype.element_ty), mask=inside)


@triton.jit
def add_outer_products(
    left, right, weights, order, offsets, out, out_bias,
    LEFT: tl.constexpr, RIGHT: tl.constexpr, LEFT_TOPK: tl.constexpr, RIGHT_TOPK: tl.constexpr,
    ADD: tl.constexpr, BIASED: tl.constexpr, WEIGHED: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_LEFT: tl.constexpr, BLOCK_RIGHT: tl.constexpr,
):  # fmt: skip
    """Sum `left_r ⊗ right_r` over each expert's rows into `out [E, LEFT, RIGHT]`, `left_r` into `out_bias`.

    `LEFT_TOPK` of 0 means that row r stands at r, otherwise at `order[r] // LEFT_TOPK`; so does `RIGHT_TOPK`.
    `WEIGHED`: the sum of `left_r` is weighted by p of each row. `ADD`: to what stands there, which is
    replaced otherwise.
    """
    expert = tl.program_id(0)
    start = tl.load(offsets + expert - 1, mask=expert > 0, other=0)
    end = tl.load(offsets + expert)
    m = tl.program_id(1) * BLOCK_LEFT + tl.arange(0, BLOCK_LEFT)
    n = tl.program_id(2) * BLOCK_RIGHT + tl.arange(0, BLOCK_RIGHT)
    total = tl.zeros((BLOCK_LEFT, BLOCK_RIGHT), dtype=tl.float32)
    sums = tl.zeros((BLOCK_LEFT,), dtype=tl.float32)
    for at in range(start, end, ROWS):
        row = at + tl.arange(0, ROWS)
        live = row < end
        pair = tl.load(order + row, mask=live, other=0)
        of_left = row.to(tl.int64) if LEFT_TOPK == 0 else pair // LEFT_TOPK
        of_right = row.to(tl.int64) if RIGHT_TOPK == 0 else pair // RIGHT_TOPK
        inside = live[:, None] & (m < LEFT)[None, :]
        a = tl.load(left + of_left[:, None] * LEFT + m[None, :], mask=inside, other=0.0)
        inside = live[:, None] & (n < RIGHT)[None, :]
        b = tl.load(right + of_right[:, None] * RIGHT + n[None, :], mask=inside, other=0.0)
        total = tl.dot(tl.trans(a), b, total, input_precision="ieee")
        if BIASED:
            wide = a.to(tl.float32)
            if WEIGHED:
                wide *= tl.load(weights + pair, mask=live, other=0.0)[:, None]
            sums += tl.sum(wide, axis=0)
    place = out + expert.to(tl.int64) * (LEFT * RIGHT) + m[:, None] * RIGHT + n[None, :]
    inside = (m < LEFT)[:, None] & (n < RIGHT)[None, :]
    if ADD:
        total += tl.load(place, mask=inside, other=0.0).to(tl.float32)
    tl.store(place, total.to(out.dtype.element_ty), mask=inside)
    if BIASED:
        place = out_bias + expert * LEFT + m
        mine = (m < LEFT) & (tl.program_id(2) == 0)
        if ADD:
            sums += tl.load(place, mask=mine, other=0.0).to(tl.float32)
        tl.store(place, sums.to(out_bias.dtype.element_ty), mask=mine)
