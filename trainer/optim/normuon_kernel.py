# mypy: disable-error-code="no-untyped-def"
"""The NorMuon step of many small matrices as a Triton kernel: state and gradient are read once.

`trainer.optim.normuon` has the formulas. A matrix of 128 × 1024 has a Gram matrix of 128 × 128, which one
program holds in registers, so that all of Polar Express but two products happens there:

    G = X Xᵀ, P = a I + b G + c G², Q ← P Q, G ← P G P                 for each iteration; X_k = Q_k X

The squares of small singular values drown in the rounding of G; after `RESTART` iterations, which have lifted
them, X is made anew from Q and its Gram matrix taken again. What is read again and again (X, in 16 bits)
lives in a scratch of a program's own, a quarter of a megabyte that is to stay in the L2 cache; gradient,
momentum, master weight and weight pass through memory once.

Products inside an iteration take their operands in fp16: their entries are of normalised matrices, far from
its limits, and its 11 bits are those of tf32 at twice the speed and half the room. The look-ahead itself has
no scale that is known before all of it was read, so it is kept in bf16. Rows of a wide matrix lie along the
short side, so that their norms are the diagonal of Q G Qᵀ and the update can be applied as it is made; those
of a tall one are measured in a pass of its own, which leaves the factor where X was.

One program works on one matrix at a time. `SHORT` is the shorter side (a power of two from 16 to 128), `LONG`
the other, worked off in tiles of `TILE`; the matrix may lie either way (`TALL`). Matrices are given by their
addresses, so that one launch updates those of all layers.
"""

import triton
import triton.language as tl

from trainer.optim.low_halves_kernel import load_master, store_master


@triton.jit
def _aligned(at, TYPE: tl.constexpr):
    """Read an address, a multiple of 16 bytes, as a pointer."""
    return tl.multiple_of(tl.load(at).to(tl.pointer_type(TYPE)), 16)


@triton.jit
def _coefficients(table, iteration: tl.constexpr):
    at = table + 3 * iteration
    return tl.load(at), tl.load(at + 1), tl.load(at + 2)


@triton.jit
def _iterate(gram, table, FIRST: tl.constexpr, LAST: tl.constexpr, SHORT: tl.constexpr, NARROW: tl.constexpr):
    """Run iterations FIRST to LAST − 1 from a Gram matrix in NARROW; return their product Q, in NARROW."""
    rows, columns = tl.arange(0, SHORT)[:, None], tl.arange(0, SHORT)[None, :]
    q = gram
    for iteration in tl.static_range(FIRST, LAST):
        a, b, c = _coefficients(table, iteration)
        p = tl.where(rows == columns, a, 0.0) + b * gram + c * tl.dot(gram, gram)
        p = p.to(NARROW)
        q = p if iteration == FIRST else tl.dot(p, q).to(NARROW)
        if iteration < LAST - 1:
            gram = tl.dot(tl.dot(p, gram).to(NARROW), p).to(NARROW)
    return q


@triton.jit
def _look_ahead(grad, momentum, at, mu, clip):
    """Move the momentum of a tile and return the look-ahead, both in fp32."""
    g = tl.load(grad + at, eviction_policy="evict_first") * clip
    m = tl.load(momentum + at, eviction_policy="evict_first").to(tl.float32)
    m = m + (1.0 - mu) * (g - m)
    tl.store(momentum + at, m.to(momentum.dtype.element_ty), eviction_policy="evict_first")
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
def _apply(master, weight, at, update, inverse, decay, LOW_HALF: tl.constexpr):
    """Subtract a tile's update, its rows scaled, from the master weight, and write the weight."""
    new = load_master(master + at, weight + at, LOW_HALF) * decay - update * inverse[:, None]
    store_master(master + at, weight + at, new, LOW_HALF)


@triton.jit
def normuon_step(
    addresses,
    scratch,
    lifted,
    table,
    rates,
    gate,
    mu,
    beta2,
    eps,
    margin,
    floor,
    matrices,
    LONG: tl.constexpr,
    SHORT: tl.constexpr,
    TILE: tl.constexpr,
    TALL: tl.constexpr,
    ITERATIONS: tl.constexpr,
    RESTART: tl.constexpr,
    AHEAD: tl.constexpr,
    MOMENTUM: tl.constexpr,
    LOW_HALF: tl.constexpr,
    PER_PROGRAM: tl.constexpr,
):
    """Update matrices `program, program + programs, …` of a list.

    Args:
        addresses: int64 `[k, 6]`: of a matrix's gradient (fp32 `[m, n]`), momentum (`[m, n]`), row statistic
            (fp32 `[m]`), master weight (see LOW_HALF) and weight (`[m, n]`); and its row of `rates`.
        scratch: `[programs, m, n]`, in the type that products take the look-ahead in (bf16 on a GPU).
        lifted: The same memory in the type that they take all else in (fp16 on a GPU).
        table: fp32 `[ITERATIONS, 3]`.
        rates: fp32 `[routes, 4]`: lr and the decay factor 1 − lr·wd; the others are not for matrices.
        gate: fp32 `[2]`: factor on the gradients; 1, or 0 where nothing is to change.
        mu: Decay of the momentum.
        beta2: Decay of the row statistic.
        eps: See `trainer.optim.normuon.normuon_update`.
        margin: 1 + safety factor of Polar Express.
        floor: Added to the norm.
        matrices: k.
        LONG: See the module, as for SHORT, TILE, TALL and RESTART.
        SHORT: See LONG.
        TILE: See LONG.
        TALL: See LONG.
        ITERATIONS: Of Polar Express.
        RESTART: See LONG; from 1 to `ITERATIONS` − 1.
        AHEAD: Tiles that the last pass has under way; the compiler sees to it only where a product waits.
        MOMENTUM: Type of the momentum, fp32 or bf16.
        LOW_HALF: The weight is bf16 and the master weight its low half, int16; else both are the same, fp32.
        PER_PROGRAM: Matrices that a program updates at most.
    """
    NARROW: tl.constexpr = lifted.dtype.element_ty
    clip = tl.load(gate)
    program, programs = tl.program_id(0), tl.num_programs(0)
    # A step whose gradients or loss are not finite changes nothing.
    matrices = tl.where(tl.load(gate + 1) > 0, matrices, 0)
    size: tl.constexpr = LONG * SHORT
    own, lifted_own = scratch + program.to(tl.int64) * size, lifted + program.to(tl.int64) * size
    for turn in range(PER_PROGRAM):
        index = program + turn * programs
        if index < matrices:
            row_of = addresses + index * 6
            grad = _aligned(row_of, tl.float32)
            momentum = _aligned(row_of + 1, MOMENTUM)
            second = tl.load(row_of + 2).to(tl.pointer_type(tl.float32))
            master = _aligned(row_of + 3, tl.int16 if LOW_HALF else tl.float32)
            weight = _aligned(row_of + 4, tl.int16)
            rate = rates + tl.load(row_of + 5) * 4
            gram = tl.zeros((SHORT, SHORT), dtype=tl.float32)
            square = 0.0
            for tile in range(LONG // TILE):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                u = _look_ahead(grad, momentum, at, mu, clip)
                square += tl.sum(u * u)
                x = u.to(scratch.dtype.element_ty)
                tl.store(own + at, x, eviction_policy="evict_last")
                gram = _add_gram(gram, x, TALL)
            scale = 1.0 / (tl.sqrt(square) * margin + floor)
            q = _iterate((gram * (scale * scale)).to(NARROW), table, 0, RESTART, SHORT, NARROW)
            narrow = (q * scale).to(scratch.dtype.element_ty)
            gram = tl.zeros((SHORT, SHORT), dtype=tl.float32)
            tl.debug_barrier()
            for tile in range(LONG // TILE):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                u = tl.load(own + at)
                x = (tl.dot(u, narrow) if TALL else tl.dot(narrow, u)).to(NARROW)
                gram = _add_gram(gram, x, TALL)
                tl.store(lifted_own + at, x, eviction_policy="evict_last")
            gram = gram.to(NARROW)
            q = _iterate(gram, table, RESTART, ITERATIONS, SHORT, NARROW)
            tl.debug_barrier()
            # The statistic of every row comes before any update.
            of_short = tl.arange(0, SHORT)
            if TALL:
                total, scaled = 0.0, 0.0
                for tile in range(LONG // TILE):
                    at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                    o = tl.dot(tl.load(lifted_own + at), q)
                    tl.store(lifted_own + at, o.to(NARROW), eviction_policy="evict_last")
                    of_long = tile * TILE + tl.arange(0, TILE)
                    norms, scaled_norms = _statistic(
                        second, of_long, tl.sum(o * o, axis=1), SHORT, beta2, eps
                    )
                    total += norms
                    scaled += scaled_norms
            else:
                row = tl.sum(tl.dot(q, gram) * q, axis=1)
                total, scaled = _statistic(second, of_short, tl.maximum(row, 0.0), LONG, beta2, eps)
            ratio: tl.constexpr = (LONG / SHORT) ** 0.5 if TALL else 1.0
            factor = tl.load(rate) * ratio * tl.sqrt(total) / tl.maximum(tl.sqrt(scaled), eps)
            decay = tl.load(rate + 1)
            tl.debug_barrier()
            for tile in tl.range(LONG // TILE, num_stages=AHEAD):
                at = _places(tile * TILE, LONG, SHORT, TILE, TALL)
                x = tl.load(lifted_own + at)
                if TALL:
                    of_long = tile * TILE + tl.arange(0, TILE)
                    inverse = factor * tl.rsqrt(tl.load(second + of_long) + eps)
                    _apply(master, weight, at, x.to(tl.float32), inverse, decay, LOW_HALF)
                else:
                    inverse = factor * tl.rsqrt(tl.load(second + of_short) + eps)
                    _apply(master, weight, at, tl.dot(q, x), inverse, decay, LOW_HALF)
            tl.debug_barrier()
