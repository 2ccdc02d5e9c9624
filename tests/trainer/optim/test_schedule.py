from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from trainer.contract.schema.training import ScheduleConfig
from trainer.errors import OptimizerError
from trainer.optim.schedule import lr_fraction, thaw_fraction, warmup_steps


class Groups:
    """All that Megatron's scheduler needs of an optimizer."""

    def __init__(self):
        self.param_groups = [{}]


@given(
    kind=st.sampled_from(["cosine", "linear", "constant"]),
    steps=st.integers(2, 60),
    warmup=st.integers(0, 20),
    minimum=st.floats(0, 1),
)
@settings(max_examples=60, deadline=None)
def test_every_step_equals_megatrons_scheduler(kind, steps, warmup, minimum):
    warmup = min(warmup, steps - 1)
    schedule = ScheduleConfig(
        kind=kind,
        warmup_fraction=0.0,
        min_warmup_steps=warmup,
        min_warmup_limit=1.0,
        min_lr_fraction=minimum,
    )
    oracle = OptimizerParamScheduler(
        Groups(),
        init_lr=0.0,
        max_lr=1.0,
        min_lr=minimum,
        lr_warmup_steps=warmup,
        lr_decay_steps=steps,
        lr_decay_style=kind,
        start_wd=0.0,
        end_wd=0.0,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )
    for step in range(steps):
        oracle.step(1)
        assert lr_fraction(step, steps, schedule) == pytest.approx(oracle.get_lr({}), abs=1e-12)


def test_the_warmup_is_the_larger_of_fraction_and_minimum():
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.02, min_warmup_steps=100, min_lr_fraction=0.1)
    assert lr_fraction(0, 1907, schedule) == pytest.approx(0.01)
    assert lr_fraction(99, 1907, schedule) == 1.0
    assert lr_fraction(1906, 1907, schedule) == pytest.approx(0.1)
    assert lr_fraction(199, 20000, schedule) == pytest.approx(0.5)


@pytest.mark.parametrize(
    ("step", "steps", "minimum_warmup", "message"),
    [
        (10, 10, 0, "step 10 is outside a run of 10"),
        (-1, 10, 0, "step -1"),
        (0, 50, 100, "50 steps.*50 of them"),
    ],
)
def test_a_step_or_warmup_outside_the_run_is_refused(step, steps, minimum_warmup, message):
    schedule = ScheduleConfig(
        kind="cosine",
        warmup_fraction=0.0,
        min_warmup_steps=minimum_warmup,
        min_warmup_limit=1.0,
        min_lr_fraction=0.1,
    )
    with pytest.raises(OptimizerError, match=message):
        lr_fraction(step, steps, schedule)


@pytest.mark.parametrize(
    ("steps", "warmup"),
    [
        (1907, 38),  # the fraction is longer than the floor
        (191, 20),  # the floor
        (96, 20),
        (80, 20),
        (38, 9),  # a quarter of the run
        (8, 2),
        (4, 1),
        (3, 0),
        (1, 0),
    ],
)
def test_the_floor_of_the_warmup_is_cut_to_a_share_of_a_short_run(steps, warmup):
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.1)
    assert (schedule.min_warmup_steps, schedule.min_warmup_limit) == (20, 0.25)
    assert warmup_steps(steps, schedule) == warmup
    rates = [lr_fraction(step, steps, schedule) for step in range(steps)]
    assert rates[:warmup] == [(step + 1) / warmup for step in range(warmup)]
    assert all(later < earlier for earlier, later in pairwise(rates[max(warmup - 1, 0) :]))
    assert rates[-1] == pytest.approx(0.1)


@given(
    steps=st.integers(1, 400),
    fraction=st.floats(0, 0.5),
    floor=st.integers(0, 100),
    limit=st.floats(0, 0.9),
)
def test_a_warmup_is_never_longer_than_both_of_its_bounds(steps, fraction, floor, limit):
    schedule = ScheduleConfig(
        kind="linear",
        warmup_fraction=fraction,
        min_warmup_steps=floor,
        min_warmup_limit=limit,
        min_lr_fraction=0.0,
    )
    warmup = warmup_steps(steps, schedule)
    assert warmup < steps
    assert warmup >= min(floor, int(limit * steps))
    assert warmup <= max(round(fraction * steps), min(floor, limit * steps))


def test_layers_that_thaw_warm_up_once_more():
    """48 steps of rest in a run of 96: a second warm-up of a quarter of the 48 steps that are left."""
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.1)
    factors = [thaw_fraction(step, 96, 48, schedule) for step in range(96)]
    assert factors[:48] == [1.0] * 48
    assert factors[48:60] == pytest.approx([(done + 1) / 12 for done in range(12)])
    assert factors[60:] == [1.0] * 36
    assert lr_fraction(48, 96, schedule) > 0.5  # where they would have started


def test_without_a_rest_or_without_room_there_is_no_second_warmup():
    schedule = ScheduleConfig(kind="cosine", warmup_fraction=0.02, min_lr_fraction=0.1)
    assert [thaw_fraction(step, 96, 0, schedule) for step in range(96)] == [1.0] * 96
    assert [thaw_fraction(step, 4, 2, schedule) for step in range(4)] == [1.0] * 4
    assert [thaw_fraction(step, 4, 4, schedule) for step in range(4)] == [1.0] * 4
