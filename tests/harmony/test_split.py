import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.harmony.split import split_hash, split_of, split_threshold


def test_golden_hash_and_thresholds():
    assert split_hash("synth-0") == 10267492082705950811
    assert split_threshold(0.001) == 18446744073709551
    assert split_threshold(0.1) == 1844674407370955161
    assert split_threshold(0.0) == 0
    assert split_threshold(1.0) == 2**64


def test_golden_members():
    def valid(count, fraction):
        return [number for number in range(count) if split_of(f"synth-{number}", fraction) == "valid"]

    assert valid(5000, 0.001) == [1144, 1516, 2481, 2666, 4008, 4293, 4662]
    assert valid(60, 0.1) == [4, 5, 11, 14, 22, 28, 39]


@pytest.mark.parametrize("fraction", [-0.1, 1.0001, float("nan")])
def test_a_fraction_outside_the_range_is_refused(fraction):
    with pytest.raises(ValueError, match="valid_fraction"):
        split_threshold(fraction)


@given(st.text(st.characters(exclude_categories=["Cs"])), st.floats(0, 1), st.floats(0, 1))
def test_a_larger_fraction_only_adds_to_the_valid_split(synth_id, one, other):
    low, high = sorted((one, other))
    assert not (split_of(synth_id, low) == "valid" and split_of(synth_id, high) == "train")
