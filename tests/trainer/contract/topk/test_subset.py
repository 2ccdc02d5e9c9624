import hashlib

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.topk.subset import scored_sequence

TOKENS = st.lists(st.integers(0, 201087), max_size=30)


@given(TOKENS, st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_sequences(tokens, one, other):
    small, large = sorted((one, other))
    assert not (scored_sequence(tokens, small) and not scored_sequence(tokens, large))


@given(TOKENS)
def test_all_or_none_at_the_ends(tokens):
    assert scored_sequence(tokens, 1.0)
    assert not scored_sequence(tokens, 0.0)


def test_the_rule_is_that_of_the_split_over_little_endian_int32():
    tokens = [200006, 1428, 199999]
    value = int(hashlib.blake2b(bytes.fromhex("460d0300940500003f0d0300"), digest_size=8).hexdigest(), 16)
    fraction = value / 2**64
    assert not scored_sequence(tokens, fraction * (1 - 1e-9))
    assert scored_sequence(np.array(tokens, ">i8"), fraction * (1 + 1e-9))


def test_the_share_is_the_fraction():
    found = sum(scored_sequence([number, 199999], 0.2) for number in range(4000))
    assert abs(found / 4000 - 0.2) < 0.02


def test_a_fraction_that_is_none_is_refused():
    with pytest.raises(ValueError, match=r"subset_fraction = 1.5"):
        scored_sequence([1], 1.5)
