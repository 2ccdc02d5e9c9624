"""Master weights as the low halves of bf16 weights.

A float32 has 32 bits, and its upper half is nearly the bf16 weight that the model computes with. A weight
that is rounded half away from zero, `(bits + 0x8000) >> 16`, says all of the upper half, given the lower one:
it is one more exactly where the lower half is 0x8000 or above. So a master weight costs 2 bytes beside the
weight instead of 4, and not a bit of it is lost. Ties alone are rounded another way than torch does, which
takes the even neighbour.
"""

import torch

_TIE = 0x8000
_NAN = 0x7FC00000
"""Rounding would carry other NaNs into the sign."""


def split(master: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cut float32 values into bf16 weights and int16 low halves, all of one shape; NaNs become one."""
    bits = master.view(torch.int32).masked_fill(master.isnan(), _NAN)
    weight = ((bits + _TIE) >> 16).to(torch.int16).view(torch.bfloat16)
    return weight, bits.to(torch.int16)


def join(weight: torch.Tensor, low: torch.Tensor) -> torch.Tensor:
    """Return the float32 values of which `split` made bf16 weights and int16 low halves."""
    lower = low.to(torch.int32) & 0xFFFF
    upper = weight.contiguous().view(torch.int16).to(torch.int32) - (lower >> 15)
    return ((upper << 16) | lower).view(torch.float32)


def belongs(weight: torch.Tensor, master: torch.Tensor) -> bool:
    """Whether weights are rounded master weights, ties either way."""
    if torch.equal(weight, master.to(weight.dtype)):
        return True
    return weight.dtype == torch.bfloat16 and torch.equal(weight, split(master)[0])
