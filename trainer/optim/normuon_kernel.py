# mypy: disable-error-code="no-untyped-def"
"""The NorMuon step of many small matrices as a Triton kernel: state and gradient are read once.

`trainer.optim.normuon` has the formulas. A matrix of 128 × 1024 has a Gram matrix of 128 × 128, which one
program holds in registers, so that all of Polar Express but two products happens there:

    G = X Xᵀ, P = a I + b G + c G², Q ← P Q, G ← P G P                 for each iteration; X_k = Q_k X

The squares of small singular values drown in the rounding of G; after `RESTART` iterations, which have lifted
them, X is made anew from Q and its Gram matrix taken again. What is read again and again (X, as bf16) lives
in a scratch of a program's own, a quarter of a megabyte that stays in the L2 cache; gradient, momentum,
master weight and weight pass through memory once.

One program works on one matrix at a time. `SHORT` is the shorter side (a power of two from 16 to 128), `LONG`
the other, worked off in tiles of `TILE`; the matrix may lie either way (`TALL`).
"""

import triton
import triton.language as tl


@triton.jit
def _coefficients(table, iteration: tl.constexpr):
    at = table + 3 * iteration
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _iterate(gram, table, FIRST: tl.constexpr, LAST: tl.constexpr, SHORT: tl.constexpr):
    """Run iterations FIRST to LAST − 1 from a Gram matrix; return their product Q."""
    rows, columns = tl.arange(0, SHORT)[:, None], tl.arange(0, SHORT)[None, :]
    identity = (rows == columns).to(tl.float32)
    q = identity
    for iteration in tl.static_range(FIRST, LAST):
        a, b, c = _coefficients(table, iteration)
        p = a * identity + b * gram + c * tl.dot(gram, gram)
        q = p if iteration == FIRST else tl.dot(p, q)
        if iteration < LAST - 1:
            gram = tl.dot(tl.dot(p, gram), p)
    return q


@triton.jit
def _look_ahead(grad, momentum, at, mu, clip):
    """Move the momentum of a tile and return the look-ahead, both in fp32."""
    g = tl.load(grad + at) * clip
    m = tl.load(momentum + at).to(tl.float32)
    m = m + (1.0 - mu) * (g - m)
    tl.store(momentum + at, m.to(momentum.dtype.element_ty))
    return g + mu * (m - g)


@triton.jit
def _places(start, LONG: tl.constexpr, SHORT: tl.constexpr, TILE: tl.constexpr, TALL: tl.constexpr):
    """Places of a tile in the matrix: `[SHORT, TILE]`, or `[TILE, SHORT]` where it is tall."""
    short, long = tl.arange(0, SHORT), start + tl.arange(0, TILE)
    if TALL:
        return long[:, None] * SHORT + short[None, :]
    else:
        return short[:, None] * LONG + long[None, :]


@triton.jit
def _add_gram(gram, x, TALL: tl.constexpr):
    """Add a tile's part to the Gram matrix of the short side."""
    turned = tl.trans(x)
    return tl.dot(turned, x, acc=gram) if TALL else tl.dot(x, turned, acc=gram)


@triton.jit
def _statistic(second, of_row, square, width, beta2, eps):
    """Move the statistic of some rows; return their squared norms, before and after they are scaled by it."""
    v = tl.load(second + of_row)
    v = v + (1.0 - beta2) * (square / width - v)
    tl.store(second + of_row, v)
    return tl.sum(square), tl.sum(square / (v + eps))


@triton.jit
def normuon_step(
    grad,
    momentum,
    second,
    master,
    weight,
    scratch,
    table,
    scalars,
    matrices,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    TALL: tl.constexpr,
    ITERATIONS: tl.constexpr,
    RESTART: tl.constexpr,
    KEEPS_MASTER: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Update matrices `program, program + programs, …` of a batch.

    Args:
        grad: fp32 `[k, m, n]`.
        momentum: `[k, m, n]`, fp32 or bf16.
        second: fp32 `[k, m]`, the row statistic.
        master: fp32 `[k, m, n]`.
        weight: `[k, m, n]`, written from `master` where it is another tensor.
        scratch: `[programs, m, n]`, in the type that products take their operands in (bf16 on a GPU).
        table: fp32 `[ITERATIONS, 3]`.
        scalars: fp32 `[8]`: lr, decay factor 1 − lr·wd, μ, β₂, ε, clip scale, 1 + safety, norm epsilon.
        matrices: k.
        LONG: See the module, as for SHORT, TILE, TALL and RESTART.
        SHORT: See LONG.
        TILE: See LONG.
        TALL: See LONG.
        ITERATIONS: Of Polar Express.
        RESTART: See LONG; from 1 to `ITERATIONS` − 1.
        KEEPS_MASTER: Whether `weight` is a tensor of its own.
        PER_PROGRAM: Matrices that a program updates at most.
    """
    lr, decay, mu, beta2 = tl.load(scalars), tl.load(scalars + 1), tl.load(scalars + 2), tl.load(scalars + 3)
    eps, clip, margin, floor = (
        tl.load(scalars + 4),
        tl.load(scalars + 5),
        tl.load(scalars + 6),
        tl.load(scalars + 7),
    )
    program, programs = tl.program_id(0), tl.num_programs(0)
    size: tl.constexpr = LONG * SHORT
    rows: tl.constexpr = LONG if TALL else SHORT
    own = scratch + program.to(tl.int64) * size
    for turn in range(PER_PROGRAM):
        index = (program + turn * programs).to(tl.int64)
        if index < matrices:
            base = index * size
            gram = tl.zeros((SHORT, SHORT), dtype=tl.float32)
            square = 0.0
            for tile in range(LONG // TILE):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                u = _look_ahead(grad + base, momentum + base, at, mu, clip)
                square += tl.sum(u * u)
                x = u.to(scratch.dtype.element_ty)
                tl.store(own + at, x)
                gram = _add_gram(gram, x, TALL)
            scale = 1.0 / (tl.sqrt(square) * margin + floor)
            q = _iterate(gram * (scale * scale), table, 0, RESTART, SHORT)
            narrow = (q * scale).to(scratch.dtype.element_ty)
            gram = tl.zeros((SHORT, SHORT), dtype=tl.float32)
            tl.debug_barrier()
            for tile in range(LONG // TILE):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                u = tl.load(own + at)
                if TALL:
                    x = tl.dot(u, narrow).to(scratch.dtype.element_ty)
                else:
                    x = tl.dot(narrow, u).to(scratch.dtype.element_ty)
                gram = _add_gram(gram, x, TALL)
                tl.store(own + at, x)
            q = _iterate(gram, table, RESTART, ITERATIONS, SHORT)
            narrow = q.to(scratch.dtype.element_ty)
            tl.debug_barrier()
            # The statistic of every row comes before any update, so the product is made, measured and kept.
            total, scaled = 0.0, 0.0
            of_short = index * rows + tl.arange(0, SHORT)
            row = tl.zeros((SHORT,), dtype=tl.float32)
            for tile in range(LONG // TILE):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                if TALL:
                    o = tl.dot(tl.load(own + at), narrow)
                    of_long = index * rows + tile * TILE + tl.arange(0, TILE)
                    norms, scaled_norms = _statistic(
                        second, of_long, tl.sum(o * o, axis=1), SHORT, beta2, eps
                    )
                    total += norms
                    scaled += scaled_norms
                else:
                    o = tl.dot(narrow, tl.load(own + at))
                    row += tl.sum(o * o, axis=1)
                tl.store(own + at, o.to(scratch.dtype.element_ty))
            if not TALL:
                total, scaled = _statistic(second, of_short, row, LONG, beta2, eps)
            ratio: tl.constexpr = (LONG / SHORT) ** 0.5 if TALL else 1.0
            factor = lr * ratio * tl.sqrt(total) / tl.maximum(tl.sqrt(scaled), eps)
            tl.debug_barrier()
            for tile in range(LONG // TILE):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                of_row = of_short
                if TALL:
                    of_row = index * rows + tile * TILE + tl.arange(0, TILE)
                inverse = factor * tl.rsqrt(tl.load(second + of_row) + eps)
                new = tl.load(master + base + at) * decay
                new -= tl.load(own + at).to(tl.float32) * inverse[:, None]
                tl.store(master + base + at, new)
                if KEEPS_MASTER:
                    tl.store(weight + base + at, new.to(weight.dtype.element_ty))
            tl.debug_barrier()
