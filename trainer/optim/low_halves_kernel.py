# mypy: disable-error-code="no-untyped-def"
"""Master weights in Triton kernels: fp32, or the low half of one beside a bf16 weight.

`trainer.optim.low_halves` says what that is.
"""

import triton
import triton.language as tl


@triton.jit
def load_master(master, weight, LOW_HALF: tl.constexpr, mask=None):
    """Read master weights, fp32.

    Args:
        master: Pointers to them, fp32; to their low halves, int16, with LOW_HALF.
        weight: Pointers to the bits of the bf16 weights, int16; not read without LOW_HALF.
        LOW_HALF: How they are kept.
        mask: Which to read.
    """
    if LOW_HALF:
        low = tl.load(master, mask=mask, eviction_policy="evict_first").to(tl.int32) & 0xFFFF
        high = tl.load(weight, mask=mask, eviction_policy="evict_first").to(tl.int32)
        return (((high - (low >> 15)) << 16) | low).to(tl.float32, bitcast=True)
    else:
        return tl.load(master, mask=mask, eviction_policy="evict_first")


@triton.jit
def store_master(master, weight, new, LOW_HALF: tl.constexpr, mask=None):
    """Write master weights, and with LOW_HALF the bf16 weights beside them.

    Args:
        master: As in `load_master`, as for LOW_HALF and `mask`.
        weight: Pointers to the bits of the bf16 weights, int16.
        new: fp32 values.
        LOW_HALF: See `master`.
        mask: See `master`.
    """
    if LOW_HALF:
        bits = new.to(tl.int32, bitcast=True)
        bits = tl.where(new != new, 0x7FC00000, bits)
        high = (bits + 0x8000) >> 16
        tl.store(weight, high.to(tl.int16), mask=mask)
        tl.store(master, bits.to(tl.int16), mask=mask)
    else:
        tl.store(master, new, mask=mask)
