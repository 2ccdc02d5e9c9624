# mypy: disable-error-code="no-untyped-def"
"""The kernels of `trainer.decoding.step`, in a module of their own: importing Triton takes a while.

A step of a few dozen tokens is bound by reading weights and by the number of kernels, so what stands between
two large products is one of them. Numbers are fp32 inside and rounded where they are stored.
"""

import triton
import triton.language as tl


@triton.jit
def add_norm(
    x,
    delta,
    pairs,
    bias,
    gain,
    normed,
    width,
    eps,
    TOPK: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Program b: `x[b] += delta[b] + bias + Σ_k pairs[b, k]` in place, and its RMSNorm times `gain`.

    `TOPK` is 0 where no experts ran, and `bias` is read where `BIASED`.
    """
    row = tl.program_id(0).to(tl.int64)
    at = tl.arange(0, BLOCK)
    here = at < width
    value = tl.load(x + row * width + at, mask=here, other=0.0).to(tl.float32)
    value += tl.load(delta + row * width + at, mask=here, other=0.0).to(tl.float32)
    if BIASED:
        value += tl.load(bias + at, mask=here, other=0.0).to(tl.float32)
    for k in tl.static_range(TOPK):
        value += tl.load(pairs + (row * TOPK + k) * width + at, mask=here, other=0.0).to(tl.float32)
    value = value.to(x.dtype.element_ty)
    tl.store(x + row * width + at, value, mask=here)
    value = value.to(tl.float32)
    scale = tl.rsqrt(tl.sum(value * value) / width + eps)
    value = value * scale * tl.load(gain + at, mask=here, other=0.0).to(tl.float32)
    tl.store(normed + row * width + at, value.to(normed.dtype.element_ty), mask=here)


@triton.jit
def squared_relu(x, count, BLOCK: tl.constexpr):
    """`relu(x)²` in place."""
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.maximum(tl.load(x + at, mask=at < count, other=0.0).to(tl.float32), 0.0)
    tl.store(x + at, (value * value).to(x.dtype.element_ty), mask=at < count)


@triton.jit
def _composed(
    row,
    bias,
    head,
    of_group,
    rank_at,
    base_at,
    at,
    live,
    RANK: tl.constexpr,
    D: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Columns `at` of heads, `Σ_r a[head, r] b[r] / R` and bias; without a rank, as they lie in `row`."""
    if RANK == 0:
        return tl.load(row + of_group * D + at, mask=live, other=0.0).to(tl.float32)
    else:
        found = 0.0
        for r in tl.static_range(RANK):
            left = tl.load(row + rank_at + head * RANK + r + at * 0, mask=live, other=0.0).to(tl.float32)
            found += left * tl.load(row + base_at + r * D + at + head * 0, mask=live, other=0.0).to(
                tl.float32
            )
        found = found / RANK
        if BIASED:
            found += tl.load(bias + of_group * D + at, mask=live, other=0.0).to(tl.float32)
        return found.to(row.dtype.element_ty).to(tl.float32)


@triton.jit
def attend(
    mixed,
    bias,
    q_gain,
    k_gain,
    cos,
    sin,
    first_value,
    logit,
    keys,
    values,
    positions,
    sink,
    slopes,
    out,
    width,
    capacity,
    eps,
    scale,
    GROUPS: tl.constexpr,
    PER_GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    Q_RANK: tl.constexpr,
    KV_RANK: tl.constexpr,
    BIASED: tl.constexpr,
    NORMED: tl.constexpr,
    ROTATED: tl.constexpr,
    FIRST: tl.constexpr,
    SINK: tl.constexpr,
    SLOPES: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Program (b, g): one group of heads of one sequence, from the projections to what it attends to.

    Composes queries, key and value (`Q_RANK` and `KV_RANK` are 0 where the projections are theirs already),
    normalises and rotates them, keeps key and value, and attends to all kept ones: `FIRST` is 1 in layer 1,
    whose values are stored, and 2 where they are mixed in; `SINK` is 1 for a sink fixed at 0, 2 for a
    learnable one. Dimensions i and i + D/2 are rotated together, so queries and keys are two halves.

    `ROWS` is `PER_GROUP` rounded up to the 16 rows that a product has at least.
    """
    b, g = tl.program_id(0).to(tl.int64), tl.program_id(1)
    half: tl.constexpr = D // 2
    position = tl.load(positions + b)
    place = position % capacity
    row = mixed + b * width
    # In a row of tensor products: factors of heads (q, k, v), then their bases (q, k, v).
    q_ranks: tl.constexpr = GROUPS * PER_GROUP * Q_RANK
    kv_ranks: tl.constexpr = GROUPS * KV_RANK
    bases: tl.constexpr = q_ranks + 2 * kv_ranks

    low, whole = tl.arange(0, half), tl.arange(0, D)
    rows = tl.arange(0, ROWS)
    live = (rows < PER_GROUP)[:, None]
    head, of_group = (g * PER_GROUP + rows)[:, None], (g * (PER_GROUP + 2) + rows)[:, None]
    q_low = _composed(row, bias, head, of_group, 0, bases, low[None, :], live, Q_RANK, D, BIASED)
    q_high = _composed(row, bias, head, of_group, 0, bases, half + low[None, :], live, Q_RANK, D, BIASED)
    of_key, of_value = g * (PER_GROUP + 2) + PER_GROUP, g * (PER_GROUP + 2) + PER_GROUP + 1
    base_k: tl.constexpr = bases + Q_RANK * D
    base_v: tl.constexpr = base_k + KV_RANK * D
    ranks_v: tl.constexpr = q_ranks + kv_ranks
    k_low = _composed(row, bias, g, of_key, q_ranks, base_k, low, low < half, KV_RANK, D, BIASED)
    k_high = _composed(row, bias, g, of_key, q_ranks, base_k, half + low, low < half, KV_RANK, D, BIASED)
    value = _composed(row, bias, g, of_value, ranks_v, base_v, whole, whole < D, KV_RANK, D, BIASED)

    kind = keys.dtype.element_ty
    if NORMED:
        q_scale = tl.rsqrt((tl.sum(q_low * q_low, axis=1) + tl.sum(q_high * q_high, axis=1)) / D + eps)[
            :, None
        ]
        q_low = (q_low * q_scale * tl.load(q_gain + low).to(tl.float32)[None, :]).to(kind).to(tl.float32)
        q_high = (
            (q_high * q_scale * tl.load(q_gain + half + low).to(tl.float32)[None, :]).to(kind).to(tl.float32)
        )
        k_scale = tl.rsqrt((tl.sum(k_low * k_low) + tl.sum(k_high * k_high)) / D + eps)
        k_low = (k_low * k_scale * tl.load(k_gain + low).to(tl.float32)).to(kind).to(tl.float32)
        k_high = (k_high * k_scale * tl.load(k_gain + half + low).to(tl.float32)).to(kind).to(tl.float32)
    if ROTATED:
        c = tl.load(cos + b * half + low).to(kind).to(tl.float32)
        s = tl.load(sin + b * half + low).to(kind).to(tl.float32)
        q_low, q_high = q_low * c[None, :] - q_high * s[None, :], q_high * c[None, :] + q_low * s[None, :]
        k_low, k_high = k_low * c - k_high * s, k_high * c + k_low * s
    of_first = first_value + (b * GROUPS + g) * D + whole
    if FIRST == 1:
        tl.store(of_first, value.to(kind))
    if FIRST == 2:
        mixing = tl.sigmoid(tl.load(logit).to(tl.float32))
        value = mixing * value + (1.0 - mixing) * tl.load(of_first).to(tl.float32)
    q_low, q_high, k_low, k_high = q_low.to(kind), q_high.to(kind), k_low.to(kind), k_high.to(kind)
    value = value.to(kind)
    start = (b * GROUPS + g) * capacity * D
    tl.store(keys + start + place * D + low, k_low)
    tl.store(keys + start + place * D + half + low, k_high)
    tl.store(values + start + place * D + whole, value)

    # The new key comes first, from registers: what was just stored is not read again.
    wide_low, wide_high = q_low.to(tl.float32), q_high.to(tl.float32)
    own = tl.sum(wide_low * k_low.to(tl.float32)[None, :], axis=1)
    own += tl.sum(wide_high * k_high.to(tl.float32)[None, :], axis=1)
    highest = own * scale
    total = tl.full([ROWS], 1.0, tl.float32)
    sums = tl.zeros([ROWS, D], tl.float32) + value.to(tl.float32)[None, :]
    if SLOPES:
        slope = tl.load(slopes + g * PER_GROUP + rows, mask=rows < PER_GROUP, other=0.0)
    count = tl.minimum(position, capacity)
    first = position * 0
    while first < count:
        at = first + tl.arange(0, BLOCK)
        seen = (at < count) & (at != place)
        lying = keys + start + at[None, :] * D + low[:, None]
        key_low = tl.load(lying, mask=seen[None, :], other=0.0)
        key_high = tl.load(lying + half, mask=seen[None, :], other=0.0)
        kept = tl.load(values + start + at[:, None] * D + whole[None, :], mask=seen[:, None], other=0.0)
        scores = tl.dot(q_low, key_low, input_precision="ieee")
        scores = tl.dot(q_high, key_high, acc=scores, input_precision="ieee") * scale
        if SLOPES:
            scores -= slope[:, None] * (position - at).to(tl.float32)[None, :]
        scores = tl.where(seen[None, :], scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, axis=1))
        shrink = tl.exp(highest - higher)
        mass = tl.exp(scores - higher[:, None])
        total = total * shrink + tl.sum(mass, axis=1)
        sums = sums * shrink[:, None]
        sums += tl.dot(mass.to(kind), kept, input_precision="ieee")
        highest = higher
        first += BLOCK
    if SINK > 0:
        sunk = tl.zeros([ROWS], tl.float32)
        if SINK == 2:
            sunk = tl.load(sink + g * PER_GROUP + rows, mask=rows < PER_GROUP, other=0.0).to(tl.float32)
        higher = tl.maximum(highest, sunk)
        shrink = tl.exp(highest - higher)
        total = total * shrink + tl.exp(sunk - higher)
        sums = sums * shrink[:, None]
    to = out + b * GROUPS * PER_GROUP * D + head * D + whole[None, :]
    tl.store(to, (sums / total[:, None]).to(out.dtype.element_ty), mask=live)


@triton.jit
def route(
    logits,
    bias,
    expert_bias,
    running,
    weights,
    chosen,
    scaling,
    E: tl.constexpr,
    TOPK: tl.constexpr,
    NUM_GROUPS: tl.constexpr,
    GROUP_TOPK: tl.constexpr,
    SIGMOID: tl.constexpr,
    BIASED: tl.constexpr,
    STEERED: tl.constexpr,
):
    """Program t: choices and weights of a token as `trainer.model.router.route`; expert E where none runs."""
    t = tl.program_id(0)
    experts = tl.arange(0, E)
    score = tl.load(logits + t * E + experts).to(tl.float32)
    if BIASED:
        score += tl.load(bias + experts).to(tl.float32)
    if SIGMOID:
        score = tl.sigmoid(score)
    selection = score
    if STEERED:
        selection += tl.load(expert_bias + experts)
    if NUM_GROUPS > 0:
        grouped = tl.reshape(selection, [NUM_GROUPS, E // NUM_GROUPS])
        members = tl.arange(0, E // NUM_GROUPS)[None, :]
        left = grouped
        of_group = tl.zeros([NUM_GROUPS], tl.float32)
        for _ in tl.static_range(TOPK // GROUP_TOPK):
            of_group += tl.max(left, axis=1)
            left = tl.where(members == tl.argmax(left, axis=1)[:, None], float("-inf"), left)
        groups = tl.arange(0, NUM_GROUPS)
        closed = tl.full([NUM_GROUPS], 1, tl.int32)
        for _ in tl.static_range(GROUP_TOPK):
            best = tl.argmax(tl.where(closed == 1, of_group, float("-inf")), axis=0)
            closed = tl.where(groups == best, 0, closed)
        selection = tl.reshape(tl.where(closed[:, None] == 1, float("-inf"), grouped), [E])
    choices = tl.arange(0, triton.next_power_of_2(TOPK))
    found = tl.zeros([triton.next_power_of_2(TOPK)], tl.float32) + float("-inf")
    places = tl.zeros([triton.next_power_of_2(TOPK)], tl.int32)
    for k in tl.static_range(TOPK):
        best = tl.argmax(selection, axis=0)
        its = tl.sum(tl.where(experts == best, score, 0.0))
        found = tl.where(choices == k, its, found)
        places = tl.where(choices == k, best, places)
        selection = tl.where(experts == best, float("-inf"), selection)
    real = choices < TOPK
    if SIGMOID:
        found = tl.where(real, found, 0.0)
        if TOPK > 1:
            found = found / (tl.sum(found) + 1e-20)
    else:
        found = tl.exp(found - tl.max(found))
        found = found / tl.sum(found)
    runs = tl.load(running + t).to(tl.int32) != 0
    tl.store(weights + t * TOPK + choices, tl.where(runs, found * scaling, 0.0), mask=real)
    tl.store(chosen + t * TOPK + choices, tl.where(runs, places, E), mask=real)


@triton.jit
def _pairs_of(chosen, expert, pairs, PAIRS: tl.constexpr):
    """Which (token, choice) pairs are an expert's: their rank among them, -1 for others, and their number."""
    at = tl.arange(0, PAIRS)
    mine = tl.load(chosen + at, mask=at < pairs, other=-1) == expert
    rank = tl.cumsum(mine.to(tl.int32)) - 1
    return tl.where(mine, rank, -1), tl.sum(mine.to(tl.int32))


@triton.jit
def _pair_at(rank, rows, PAIRS: tl.constexpr):
    """Find the pair that has a rank, for some ranks; 0 where none has."""
    at = tl.arange(0, PAIRS)
    return tl.sum(tl.where(rank[None, :] == rows[:, None], at[None, :], 0), axis=1)


@triton.jit
def experts_in(
    x,
    weight,
    bias,
    weights,
    chosen,
    out,
    pairs,
    width,
    inner,
    TOPK: tl.constexpr,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    STEPS: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Program (e, j): columns j of `p relu(W₁ x + b₁)²` for the pairs of expert e, each in its own row."""
    e = tl.program_id(0)
    rank, count = _pairs_of(chosen, e, pairs, PAIRS)
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < inner
    matrix = weight + e.to(tl.int64) * inner * width
    first = count * 0
    while first < count:
        rows = first + tl.arange(0, ROWS)
        pair = _pair_at(rank, rows, PAIRS)
        live = rows < count
        sums = tl.zeros([ROWS, COLUMNS], tl.float32)
        for step in range(STEPS):
            at = step * BLOCK + tl.arange(0, BLOCK)
            here = at < width
            left = tl.load(
                x + (pair // TOPK)[:, None] * width + at[None, :],
                mask=live[:, None] & here[None, :],
                other=0.0,
            )
            right = tl.load(
                matrix + columns[None, :] * width + at[:, None],
                mask=inside[None, :] & here[:, None],
                other=0.0,
            )
            sums = tl.dot(left, right, acc=sums, input_precision="ieee")
        if BIASED:
            sums += tl.load(bias + e * inner + columns, mask=inside, other=0.0).to(tl.float32)[None, :]
        sums = tl.maximum(sums, 0.0)
        p = tl.load(weights + pair, mask=live, other=0.0)
        sums = sums * sums * p[:, None]
        to = out + pair[:, None] * inner + columns[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
        first += ROWS


@triton.jit
def experts_out(
    hidden,
    weight,
    bias,
    weights,
    chosen,
    out,
    pairs,
    width,
    inner,
    PAIRS: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
    BIASED: tl.constexpr,
):
    """Program (e, j): columns j of `W₂ h + p b₂` for the pairs of expert e; e = E clears those of nobody."""
    e = tl.program_id(0)
    rank, count = _pairs_of(chosen, e, pairs, PAIRS)
    nobody = e == tl.num_programs(0) - 1
    columns = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    inside = columns < width
    at = tl.arange(0, BLOCK)
    here = (at < inner) & (nobody == 0)
    matrix = weight + tl.where(nobody, 0, e).to(tl.int64) * inner * width
    first = count * 0
    while first < count:
        rows = first + tl.arange(0, ROWS)
        pair = _pair_at(rank, rows, PAIRS)
        live = rows < count
        right = tl.load(
            matrix + columns[None, :] * inner + at[:, None], mask=inside[None, :] & here[:, None], other=0.0
        )
        left = tl.load(
            hidden + pair[:, None] * inner + at[None, :], mask=live[:, None] & here[None, :], other=0.0
        )
        sums = tl.dot(left, right, input_precision="ieee")
        if BIASED:
            p = tl.load(weights + pair, mask=live, other=0.0)
            of_columns = tl.load(bias + tl.where(nobody, 0, e) * width + columns, mask=inside, other=0.0)
            sums += p[:, None] * of_columns.to(tl.float32)[None, :]
        to = out + pair[:, None].to(tl.int64) * width + columns[None, :]
        tl.store(to, sums.to(out.dtype.element_ty), mask=live[:, None] & inside[None, :])
        first += ROWS
