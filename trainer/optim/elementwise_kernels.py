# mypy: disable-error-code="no-untyped-def"
"""Triton kernels over many tensors at once: sum of squares, AdamW and SGD, and both ends of NorMuon.

A table has a row of addresses for each tensor, a list cuts all of them into chunks of `CHUNK` elements, and a
program works on one chunk (or a few, one after another). So one launch serves a thousand vectors as well as
an embedding. With ALIGNED all addresses are multiples of 16 bytes and all lengths of 16 elements.

Everything writes nothing where `gate[1]` is 0: a step that is not finite changes nothing.
"""

import triton
import triton.language as tl

from trainer.optim.low_halves_kernel import load_master, store_master


@triton.jit
def _pointer(at, TYPE: tl.constexpr, ALIGNED: tl.constexpr):
    """Read an address as a pointer."""
    pointer = tl.load(at).to(tl.pointer_type(TYPE))
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    return pointer


@triton.jit
def _chunk(table, chunks, index, wanted, WIDTH: tl.constexpr, CHUNK: tl.constexpr, ALIGNED: tl.constexpr):
    """Return a chunk's row of the table, its elements' numbers in the tensor, and which of them there are.

    A row's last number is the length of its tensor. Where `wanted` is 0 there are none.
    """
    row = table + tl.load(chunks + 2 * index).to(tl.int64) * WIDTH
    at = tl.load(chunks + 2 * index + 1).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    length = tl.where(wanted > 0, tl.load(row + WIDTH - 1), 0)
    if ALIGNED:
        length = tl.multiple_of(length, 16)
    return row, at, at < length


@triton.jit
def sum_of_squares(
    table,
    chunks,
    sums,
    count,
    CHUNK: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Sum the squares of `PER_PROGRAM` chunks into one number a program, in fp32, always in the same order.

    Args:
        table: int64 `[tensors, 2]`: address of an fp32 tensor and its length.
        chunks: int32 `[count, 2]`: tensor, and number of the chunk in it.
        sums: fp32 `[programs]`.
        count: Chunks.
        CHUNK: Elements of a chunk.
        PER_PROGRAM: Chunks of a program.
        ALIGNED: See the module.
    """
    first = tl.program_id(0) * PER_PROGRAM
    total = tl.zeros((CHUNK,), dtype=tl.float32)
    for turn in range(PER_PROGRAM):
        if first + turn < count:
            row, at, there = _chunk(table, chunks, first + turn, 1, 2, CHUNK, ALIGNED)
            value = tl.load(_pointer(row, tl.float32, ALIGNED) + at, mask=there, other=0.0)
            total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def adamw_step(
    table,
    chunks,
    rates,
    gate,
    beta1,
    beta2,
    eps,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_HALF: tl.constexpr,
    MOMENTS: tl.constexpr,
):
    """One step of AdamW (`trainer.optim.adamw` has the formulas), or without MOMENTS of SGD.

    Args:
        table: int64 `[tensors, 7]`: addresses of gradient, m, v (fp32; 0 without MOMENTS), master weight and
            weight (as in `trainer.optim.low_halves_kernel`); row of `rates`; length.
        chunks: int32 `[programs, 2]`: tensor, and number of the chunk in it.
        rates: fp32 `[routes, 4]`: lr, decay factor 1 − lr·wd, lr / (1 − β₁ᵗ), √(1 − β₂ᵗ).
        gate: fp32 `[2]`: factor on the gradients; 1, or 0 where nothing is to change.
        beta1: Decay of m.
        beta2: Decay of v.
        eps: Added to √v̂.
        CHUNK: Elements of a chunk.
        ALIGNED: See the module.
        LOW_HALF: How master weights are kept.
        MOMENTS: AdamW.
    """
    row, at, there = _chunk(table, chunks, tl.program_id(0), tl.load(gate + 1), 7, CHUNK, ALIGNED)
    gradient = _pointer(row, tl.float32, ALIGNED) + at
    master = _pointer(row + 3, tl.int16 if LOW_HALF else tl.float32, ALIGNED) + at
    weight = _pointer(row + 4, tl.int16, ALIGNED) + at
    rate = rates + tl.load(row + 5) * 4
    g = tl.load(gradient, mask=there, other=0.0) * tl.load(gate)
    new = load_master(master, weight, LOW_HALF, mask=there) * tl.load(rate + 1)
    if MOMENTS:
        average = _pointer(row + 1, tl.float32, ALIGNED) + at
        square = _pointer(row + 2, tl.float32, ALIGNED) + at
        m = tl.load(average, mask=there, other=0.0)
        v = tl.load(square, mask=there, other=0.0)
        m = m + (1.0 - beta1) * (g - m)
        v = v * beta2 + (1.0 - beta2) * g * g
        tl.store(average, m, mask=there)
        tl.store(square, v, mask=there)
        new -= tl.load(rate + 2) * (m / (tl.sqrt(v) / tl.load(rate + 3) + eps))
    else:
        new -= tl.load(rate) * g
    store_master(master, weight, new, LOW_HALF, mask=there)


@triton.jit
def look_ahead(
    table,
    chunks,
    gate,
    stack,
    mu,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    MOMENTUM: tl.constexpr,
):
    """Move NorMuon's momenta and write their look-ahead, `trainer.optim.normuon.nesterov_momentum`.

    Args:
        table: int64 `[tensors, 7]`: addresses of gradient (fp32), momentum, master weight and weight; place
            of the tensor in `stack`, in elements; row of the rates; length.
        chunks: int32 `[programs, 2]`: tensor, and number of the chunk in it.
        gate: fp32 `[2]`: factor on the gradients; 1, or 0 where nothing is to change.
        stack: fp32, the look-aheads one after another.
        mu: Decay of the momentum.
        CHUNK: Elements of a chunk.
        ALIGNED: See the module.
        MOMENTUM: Type of the momenta, fp32 or bf16.
    """
    row, at, there = _chunk(table, chunks, tl.program_id(0), tl.load(gate + 1), 7, CHUNK, ALIGNED)
    momentum = _pointer(row + 1, MOMENTUM, ALIGNED) + at
    g = tl.load(_pointer(row, tl.float32, ALIGNED) + at, mask=there, other=0.0) * tl.load(gate)
    m = tl.load(momentum, mask=there, other=0.0).to(tl.float32)
    m = m + (1.0 - mu) * (g - m)
    tl.store(momentum, m.to(MOMENTUM), mask=there)
    place = tl.load(row + 4)
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    tl.store(stack + place + at, g + mu * (m - g), mask=there)


@triton.jit
def apply_update(
    table,
    chunks,
    rates,
    gate,
    stack,
    CHUNK: tl.constexpr,
    ALIGNED: tl.constexpr,
    LOW_HALF: tl.constexpr,
):
    """Decay master weights and subtract lr times their updates.

    Args:
        table: Of `look_ahead`.
        chunks: Of `look_ahead`.
        rates: fp32 `[routes, 4]`: lr, decay factor 1 − lr·wd, and two numbers that are not for matrices.
        gate: fp32 `[2]`: see `look_ahead`.
        stack: fp32, the updates one after another.
        CHUNK: Elements of a chunk.
        ALIGNED: See the module.
        LOW_HALF: How master weights are kept.
    """
    row, at, there = _chunk(table, chunks, tl.program_id(0), tl.load(gate + 1), 7, CHUNK, ALIGNED)
    master = _pointer(row + 2, tl.int16 if LOW_HALF else tl.float32, ALIGNED) + at
    weight = _pointer(row + 3, tl.int16, ALIGNED) + at
    place = tl.load(row + 4)
    if ALIGNED:
        place = tl.multiple_of(place, 16)
    rate = rates + tl.load(row + 5) * 4
    update = tl.load(stack + place + at, mask=there, other=0.0)
    new = load_master(master, weight, LOW_HALF, mask=there) * tl.load(rate + 1) - tl.load(rate) * update
    store_master(master, weight, new, LOW_HALF, mask=there)
