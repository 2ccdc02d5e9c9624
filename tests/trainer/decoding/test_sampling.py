"""Choosing the next token: against `transformers`' filters, and as a distribution."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from trainer.decoding.sampling import Chance, Sampling, choose, keep_likely


def random_logits(rows: int, vocabulary: int, seed: int = 0, spread: float = 3.0) -> torch.Tensor:
    return spread * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed))


@settings(max_examples=60, deadline=None)
@given(
    temperature=st.floats(0.1, 4.0),
    top_k=st.integers(0, 45),
    top_p=st.floats(0.02, 1.0),
    seed=st.integers(0, 1000),
)
def test_the_filters_are_those_of_transformers(temperature, top_k, top_p, seed):
    logits = random_logits(3, 40, seed)
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1.0:
        expected = TopPLogitsWarper(top_p)(None, expected)
    found = keep_likely(logits, Sampling(temperature, top_k, top_p))
    # A token exactly on the edge of top_p falls on either side by round-off.
    ordered = expected.softmax(-1)
    assert ((found.isinf() == expected.isinf()) | (ordered < 1e-6)).all()
    both = ~found.isinf() & ~expected.isinf()
    torch.testing.assert_close(found[both], expected[both])


def test_top_k_with_ties_keeps_all_of_them_and_top_p_always_keeps_the_likeliest():
    tied = torch.tensor([[1.0, 2.0, 2.0, 0.0]])
    assert keep_likely(tied, Sampling(1.0, top_k=1)).isinf().tolist() == [[True, False, False, True]]
    certain = torch.tensor([[0.0, 30.0, 0.0]])
    assert keep_likely(certain, Sampling(1.0, top_p=1e-3)).isinf().tolist() == [[True, False, True]]


def test_samples_follow_the_distribution():
    """Pearson's chi-squared over 20,000 draws; the seed is fixed, so the outcome is too."""
    logits = random_logits(1, 12, seed=4, spread=1.0)
    sampling = Sampling(temperature=0.7, top_p=0.9)
    probabilities = keep_likely(logits, sampling).double().softmax(-1)[0].numpy()
    rows, chances = 20_000, [Chance(seed) for seed in range(20_000)]
    tokens, logprobs = choose(logits.expand(rows, -1), sampling, chances)
    counts = np.bincount(tokens, minlength=12)
    assert counts[probabilities == 0].sum() == 0
    possible = probabilities > 0
    expected = rows * probabilities[possible]
    chi_squared = ((counts[possible] - expected) ** 2 / expected).sum()
    assert chi_squared < 30.0  # 99.9 % quantile for 10 degrees of freedom: 29.6
    assert possible.sum() <= 11
    np.testing.assert_allclose(logprobs, logits[0].log_softmax(-1)[torch.tensor(tokens)].numpy(), atol=1e-6)


def test_greedy_takes_the_first_of_the_likeliest_and_draws_nothing():
    logits = torch.tensor([[0.0, 5.0, 5.0], [1.0, 0.0, -1.0]])
    chances = [Chance(0), Chance(0)]
    tokens, logprobs = choose(logits, Sampling(), chances)
    assert tokens == [1, 0]
    np.testing.assert_allclose(logprobs, logits.log_softmax(-1)[[0, 1], tokens], atol=1e-6)
    assert [chance.draw() for chance in chances] == [Chance(0).draw()] * 2


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**64 - 1), company=st.lists(st.integers(0, 2**64 - 1), max_size=4))
def test_a_rows_draws_depend_on_its_seed_alone(seed, company):
    logits = random_logits(1, 50, seed=9)
    sampling = Sampling(temperature=1.3)
    alone, crowd = [Chance(seed)], [Chance(other) for other in company] + [Chance(seed)]
    for _ in range(3):
        (token,), _ = choose(logits, sampling, alone)
        tokens, _ = choose(logits.expand(len(crowd), -1), sampling, crowd)
        assert tokens[-1] == token


def test_draws_are_the_same_on_every_machine():
    """Numbers of numpy's Philox 4×64 with key 7, whose stream numpy keeps stable."""
    chance = Chance(7)
    generator = np.random.Philox(key=7)
    expected = [(int(generator.random_raw()) >> 11) / 2**53 for _ in range(5)]
    assert [chance.draw() for _ in range(5)] == expected


def test_a_draw_at_the_very_end_never_finds_a_token_without_probability():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])

    class Last(Chance):
        def draw(self):
            return 1.0 - 2.0**-53

    assert choose(logits, Sampling(1.0), [Last(0)])[0] == [1]


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0), Sampling(1.0, top_k=2, top_p=0.5)])
def test_logits_that_are_not_finite_are_refused(value, sampling):
    logits = torch.zeros(2, 5)
    logits[1, 3] = value
    with pytest.raises(FloatingPointError, match="row 1 are not finite"):
        choose(logits, sampling, [Chance(0), Chance(1)])


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"temperature": -1.0}, "temperature = -1.0"),
        ({"temperature": math.nan}, "temperature = nan"),
        ({"temperature": 1.0, "top_k": -1}, "top_k = -1"),
        ({"temperature": 1.0, "top_p": 0.0}, "top_p = 0.0"),
        ({"temperature": 1.0, "top_p": 1.1}, "top_p = 1.1"),
        ({"top_p": 0.9}, "no effect at temperature 0"),
        ({"top_k": 9}, "no effect at temperature 0"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values, message):
    with pytest.raises(ValueError, match=message):
        Sampling(**values)


@pytest.mark.parametrize("seed", [-1, 2**64])
def test_a_seed_out_of_range_is_refused(seed):
    with pytest.raises(ValueError, match="seed"):
        Chance(seed)
