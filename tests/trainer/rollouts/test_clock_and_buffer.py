"""The logical clock and the pool, against a simulation that follows the rule word by word."""

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.trainer.rollouts.cases import rollout
from trainer.rollouts.buffer import Buffer, fill
from trainer.rollouts.clock import Clock


@st.composite
def clocks(draw):
    delay = draw(st.integers(0, 3))
    size = (delay + 1) * draw(st.integers(1, 4)) + draw(st.integers(0, delay))
    return Clock(draw(st.integers(1, 12)), delay, delay + draw(st.integers(0, 2)), size)


@settings(deadline=None)
@given(clocks())
def test_every_round_is_made_once_before_its_step_with_the_weights_that_its_number_says(clock):
    made = {}
    for step in range(1, clock.steps + 1):
        for number in clock.due(step):
            assert number not in made
            made[number] = step - 1
        assert sorted(clock.under_way(step)) == sorted(number for number in made if number > step)
    assert made == {number: max(0, number - 1 - clock.delay) for number in range(1, clock.steps + 1)}
    assert all(clock.born(number) == after for number, after in made.items())


@settings(deadline=None)
@given(clocks(), st.data())
def test_every_rollout_is_trained_on_once_or_dropped_once_or_still_waits(clock, data):
    capacity, buffer = 12, Buffer(clock)
    lengths = st.integers(2, capacity)
    waiting, seen, dropped = [], Counter(), 0
    for step in range(1, clock.steps + 1):
        for number in clock.due(step):
            buffer.put(
                number,
                [
                    rollout(number, clock.born(number), 1, data.draw(lengths) - 1, document=place)
                    for place in range(clock.per_round)
                ],
            )
        arrived = buffer.under_way[step]
        gone = buffer.arrive(step, arrived)
        rows = data.draw(st.integers(1, clock.per_round))
        taken = buffer.take(rows, capacity)

        # The rule, word by word.
        old = [one for one in waiting if step - 1 - one.born > clock.max_staleness]
        pool = [one for one in waiting if step - 1 - one.born <= clock.max_staleness] + list(arrived)
        room, expected, left = [capacity] * rows, [[] for _ in range(rows)], []
        for one in pool:
            row = room.index(max(room))
            if one.length <= room[row]:
                room[row] -= one.length
                expected[row].append(one)
            else:
                left.append(one)
        assert [[id(one) for one in row] for row in taken] == [[id(one) for one in row] for row in expected]
        assert [id(one) for one in buffer.pool] == [id(one) for one in left]
        assert all(taken), "no row is empty: a round has as many rollouts as a step has rows"
        assert gone == len(old)
        waiting, dropped = left, dropped + gone
        seen.update((one.number, one.request.document) for row in taken for one in row)
        everything = len(buffer.pool) + sum(map(len, buffer.under_way.values()))
        assert everything <= (clock.max_staleness + clock.delay + 1) * clock.per_round
    assert buffer.dropped == dropped
    assert set(seen.values()) <= {1}
    assert len(seen) + dropped + len(buffer.pool) == clock.steps * clock.per_round


def test_a_rollout_that_fits_no_row_waits_and_shorter_ones_pass_it():
    assert fill([6, 6, 5, 4], rows=2, capacity=10) == [0, 1, None, 0]
    assert fill([3], rows=0, capacity=10) == [None]
