"""The walk over the prompts: seeded, complete, resumable at any place."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.rollouts.cases import Phase, tiny_prompts
from trainer.errors import DataError
from trainer.rollouts.curriculum import mode_of, phase_of
from trainer.rollouts.prompts import PromptWalk, identity_of, seed_of

PLAIN = (Phase(),)


def walk(count=10, longest=20, curriculum=PLAIN, seed=7, steps=100):
    return PromptWalk(tiny_prompts(count), curriculum, seed=seed, steps=steps, longest=longest)


def names(requests):
    return [(one.epoch, one.document, one.sample, one.mode, one.prompt.tolist()) for one in requests]


@settings(deadline=None, max_examples=40)
@given(
    st.lists(st.integers(1, 7), min_size=1, max_size=8),
    st.integers(1, 3),
    st.integers(0, 7),
    st.integers(1, 9),
)
def test_any_rounds_ask_the_same_and_a_walk_goes_on_from_any_place(sizes, answers, cut, count):
    curriculum = (Phase(medium=0.5, high=0.5, rollouts=answers),)
    whole = walk(count, curriculum=curriculum)
    expected = names(whole.take(1, sum(sizes)))
    parts = walk(count, curriculum=curriculum)
    found = []
    for place, size in enumerate(sizes):
        if place == cut:
            state = parts.state_dict()
            parts = walk(count, curriculum=curriculum)
            parts.load_state_dict(state)
        found += names(parts.take(1, size))
    assert found == expected
    assert parts.state_dict() == whole.state_dict()
    prompts = [(epoch, document) for epoch, document, *_ in expected]
    full = Counter(prompts[: len(prompts) // answers * answers])
    assert set(full.values()) <= {answers}, "each prompt gets its answers, one after the other"
    first = [document for epoch, document in prompts if epoch == 0]
    assert len(set(first)) == min(count, -(-len(prompts) // answers)), "each conversation once an epoch"


def test_a_prompt_that_leaves_no_room_is_passed_over_and_counted():
    found = walk(10, longest=6)
    asked = found.take(1, 10)
    assert {one.document for one in asked} == {0, 1, 2, 3, 4}
    assert all(len(one.prompt) <= 6 for one in asked)
    assert found.skipped in range(5, 11)
    with pytest.raises(DataError, match=r"none of the 10 conversations .* at most 1 tokens .*max_new_tokens"):
        walk(10, longest=1).take(1, 1)


def test_modes_and_answers_follow_the_phases():
    phases = (Phase(0.25), Phase(0.5, medium=0.7, high=0.3, rollouts=2), Phase(1.0, 0.2, 0.3, 0.5, 3))
    assert [phase_of(phases, number, 8).rollouts for number in range(1, 9)] == [1, 1, 2, 2, 3, 3, 3, 3]
    counts = Counter(mode_of(phases[2], 1, 0, document) for document in range(4000))
    assert counts["low"] / 4000 == pytest.approx(0.2, abs=0.03)
    assert counts["medium"] / 4000 == pytest.approx(0.3, abs=0.03)
    assert {mode_of(phases[0], 1, 0, document) for document in range(50)} == {"medium"}
    later = walk(10, curriculum=phases, steps=8).take(8, 12)
    assert Counter((one.epoch, one.document) for one in later) == dict.fromkeys(
        [(one.epoch, one.document) for one in later], 3
    )
    by_mode = {one.mode: int(one.prompt[0]) for one in later}
    assert all(length == len(mode) for mode, length in by_mode.items())


def test_seeds_are_of_what_was_asked_and_of_the_round_and_all_different():
    asked = walk(10, curriculum=(Phase(rollouts=2),)).take(1, 20)
    seeds = {seed_of(seed, one, number) for seed in (1, 2) for one in asked for number in (1, 2)}
    assert len(seeds) == 80
    assert seed_of(1, asked[0], 1) == seed_of(1, asked[0], 1)
    assert min(seeds) >= 0
    assert max(seeds) < 2**64


def test_another_order_of_prompts_is_refused():
    state = walk().state_dict()
    with pytest.raises(DataError, match="the data set or the seed changed"):
        walk().load_state_dict(state | {"identity": identity_of("other", 0)})
    with pytest.raises(DataError, match="prompt 11 of 10"):
        walk().load_state_dict(state | {"index": 11})
    orders = [[one.document for one in walk(seed=seed).take(1, 10)] for seed in (1, 2)]
    assert orders[0] != orders[1]
    assert np.array_equal(sorted(orders[0]), range(10))
