# mypy: disable-error-code="no-untyped-def"
"""Cross-entropy of a chunk of logits and its gradient, read twice; apart, since Triton imports slowly."""

import triton
import triton.language as tl


@triton.jit
def cross_entropy_rows(
    logits, labels, weights, ce, grad, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr, GRADIENT: tl.constexpr
):
    """Program r: `ce = log Σ exp(l) − l[label]`, and `weight (softmax(l) − onehot(label))` in `grad`.

    The sum is taken while the maximum is still being looked for: each of `BLOCK` columns has both of its own,
    which are joined at the end.
    """
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, BLOCK)
    here = logits + row * VOCABULARY
    highest = tl.full((BLOCK,), float("-inf"), dtype=tl.float32)
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    for at in range(0, VOCABULARY, BLOCK):
        value = tl.load(here + at + column, mask=at + column < VOCABULARY, other=float("-inf"))
        higher = tl.maximum(highest, value)
        # A column that has seen nothing yet: its −inf less −inf would be no number.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.exp(value - shift)
        highest = higher
    maximum = tl.max(highest, axis=0)
    log_sum = maximum + tl.log(tl.sum(total * tl.exp(highest - maximum), axis=0))
    label = tl.load(labels + row)
    tl.store(ce + row, log_sum - tl.load(here + label))
    if GRADIENT:
        weight = tl.load(weights + row)
        out = grad + row * VOCABULARY
        for at in range(0, VOCABULARY, BLOCK):
            inside = at + column < VOCABULARY
            value = tl.load(here + at + column, mask=inside, other=0.0)
            slope = tl.exp(value - log_sum) - tl.where(at + column == label, 1.0, 0.0)
            tl.store(out + at + column, (slope * weight).to(grad.dtype.element_ty), mask=inside)
