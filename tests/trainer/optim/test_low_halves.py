"""Master weights as low halves: every bit comes back, and torch's rounding differs at ties alone."""

import struct

import torch
from hypothesis import given
from hypothesis import strategies as st

from trainer.optim.low_halves import belongs, join, split


@given(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=64))
def test_every_bit_comes_back_and_the_weight_is_rounded_away_from_zero_at_ties(patterns):
    master = torch.tensor(patterns, dtype=torch.uint32).view(torch.float32)
    weight, low = split(master)
    numbers = ~master.isnan()
    back = join(weight, low)
    assert back.view(torch.int32)[numbers].tolist() == master.view(torch.int32)[numbers].tolist()
    assert weight.isnan().tolist() == (~numbers).tolist() == back.isnan().tolist()
    for bits, found in zip(patterns, weight.tolist(), strict=True):
        value, lower = struct.unpack("f", struct.pack("I", bits))[0], bits & 0xFFFF
        if value == value and lower != 0x8000:
            assert found == torch.tensor(value).bfloat16().item()
        elif value == value:  # a tie: the neighbour of the larger magnitude
            above = (bits & 0xFFFF0000) + 0x10000 & 0xFFFFFFFF
            assert found == struct.unpack("f", struct.pack("I", above))[0]


def test_weights_belong_to_masters_whichever_way_their_ties_were_rounded():
    tie = torch.tensor([0x3F808000, 0x3F800001], dtype=torch.int32).view(torch.float32)
    assert split(tie)[0][0] != tie.bfloat16()[0]
    assert belongs(split(tie)[0], tie)
    assert belongs(tie.bfloat16(), tie)
    assert not belongs(torch.ones(2, dtype=torch.bfloat16) * 2, tie)
    assert belongs(tie, tie)
