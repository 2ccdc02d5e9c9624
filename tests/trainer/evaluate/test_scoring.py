"""Scores of continuations against `transformers`, whatever shares a row or a batch with them."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.evaluate.evaluation_inputs import plain_logprobs
from trainer.evaluate.scoring import Scored, common_prefix, common_suffix, count_rows, score
from trainer.evaluate.suite import Batching

IDS = st.integers(0, 255)


def groups(seed: int, count: int) -> list[list[Scored]]:
    """Groups of one to four sequences with prefixes, single-token ends and repetitions in common."""
    pick = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        prefix = pick.integers(0, 256, size=int(pick.integers(1, 40))).tolist()
        group = []
        for _ in range(int(pick.integers(1, 5))):
            tokens = prefix + pick.integers(0, 4, size=int(pick.choice([1, 1, 2, 7]))).tolist()
            group.append(Scored(tokens, int(pick.integers(1, len(tokens)))))
        made.append(group)
    return made


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("batching", [Batching(1, 1), Batching(32, 4096), Batching(3, 100)])
def test_scores_are_those_of_transformers_one_sequence_at_a_time(llama, batching, share):
    asked = groups(1, 12)
    seen: list[int] = []
    found = score(llama, asked, batching, share=share, tick=seen.append)
    for group, scores in zip(asked, found, strict=True):
        for sequence, ours in zip(group, scores, strict=True):
            logprobs, greedy = plain_logprobs(llama.module, list(sequence.tokens))
            np.testing.assert_allclose(ours.logprobs, logprobs[sequence.start - 1 :], rtol=1e-4, atol=1e-5)
            assert ours.greedy.tolist() == greedy[sequence.start - 1 :].tolist()
    assert max(seen) <= batching.rows
    if share:
        assert sum(seen) == count_rows(llama, asked)


def test_our_own_checkpoint_gives_the_same_scores_shared_or_not(student):
    asked = [[Scored([5000 + t * 7 for t in s.tokens], s.start) for s in group] for group in groups(2, 8)]
    alone = score(student, asked, Batching(1, 1), share=False)
    shared = score(student, asked, Batching(16, 2048))
    for ours, theirs in zip(shared, alone, strict=True):
        for left, right in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(left.logprobs, right.logprobs, rtol=1e-4, atol=1e-4)


def test_a_group_is_one_row_where_prefixes_are_shared_and_choices_of_one_token_always_are(llama):
    choices = [Scored([1, 2, 3, 4, last], 4) for last in range(4)]
    longer = [Scored([1, 2, 3, 4, last, 9], 4) for last in range(4)]
    assert count_rows(llama, [choices, longer]) == 2
    llama.shares_prefixes = False
    try:
        assert count_rows(llama, [choices, longer]) == 5
    finally:
        llama.shares_prefixes = True


def test_a_sequence_with_nothing_to_score_is_refused():
    for start in (0, 3):
        with pytest.raises(ValueError, match="nothing to score"):
            Scored([1, 2, 3], start)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), max_size=6), min_size=1, max_size=4))
def test_common_prefix_and_suffix_are_the_longest(sequences):
    n = common_prefix(sequences)
    assert all(sequence[:n] == sequences[0][:n] for sequence in sequences)
    assert any(len(s) == n for s in sequences) or len({s[n] for s in sequences}) > 1
    m = common_suffix(sequences)
    assert all(
        sequence[len(sequence) - m :] == sequences[0][len(sequences[0]) - m :] for sequence in sequences
    )
    assert any(len(s) == m for s in sequences) or len({s[-m - 1] for s in sequences}) > 1
