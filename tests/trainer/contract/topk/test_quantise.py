import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.quantise import quantise, to_logprobs


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(1e-12, 1), min_size=1, max_size=60),
    st.sampled_from([0.001, 0.01, 0.05]),
    st.floats(0, 1),
)
def test_the_mass_stays_below_one_and_every_logprob_within_the_bound(weights, error, tail):
    """Also where nothing is left to absorb a rounding: a distribution kept whole, whatever it is."""
    probabilities = np.sort(np.array([*weights, tail]))[::-1] / (sum(weights) + tail)
    kept = np.log(probabilities[:-1])[None].astype(np.float32)
    rest = np.float32(max(0.0, 1 - np.exp(kept.astype(float)).sum()))[None]
    steps, tails, phases = quantise(kept, rest, error)
    decoded = to_logprobs(steps, phases[:, None], error).astype(float)
    mass = np.exp(decoded).sum()
    if rest[0] > 0:
        last = to_logprobs(tails, phases, error).astype(float)
        assert abs(last[0] - np.log(float(rest[0]))) <= error * 1.001
        mass += np.exp(last[0])
    assert mass <= 1
    assert np.abs(decoded - kept).max() <= error + 2e-6
    assert (np.diff(steps[0]) >= 0).all()


def test_a_uniform_distribution_kept_whole_fits_for_every_size():
    """The hardest one: every rounding error is the same, and nearest rounding alone would exceed 1."""
    for size in range(1, 300):
        kept = np.full((1, size), -np.log(size), np.float32)
        steps, _, phases = quantise(kept, np.zeros(1, np.float32), 0.01)
        decoded = to_logprobs(steps, phases[:, None], 0.01).astype(float)
        assert np.exp(decoded).sum() <= 1
        assert np.abs(decoded - kept).max() <= 0.01 + 1e-6


def test_a_mass_above_one_is_refused():
    with pytest.raises(StoreError, match="position 0 has a mass above 1"):
        quantise(np.zeros((1, 2), np.float32), np.zeros(1, np.float32), 0.01)
