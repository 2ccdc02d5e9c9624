import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler

from trainer.contract.schema.training import ScheduleConfig
from trainer.errors import OptimizerError
from trainer.optim.schedule import lr_fraction


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
        kind=kind, warmup_fraction=0.0, min_warmup_steps=warmup, min_lr_fraction=minimum
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
        (0, 50, 100, "50 steps.*100 of them"),
    ],
)
def test_a_step_or_warmup_outside_the_run_is_refused(step, steps, minimum_warmup, message):
    schedule = ScheduleConfig(
        kind="cosine", warmup_fraction=0.0, min_warmup_steps=minimum_warmup, min_lr_fraction=0.1
    )
    with pytest.raises(OptimizerError, match=message):
        lr_fraction(step, steps, schedule)
