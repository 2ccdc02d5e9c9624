"""The learning-rate schedule: a pure function of the step, so there is no state that a resume could lose."""

import math

from trainer.contract.schema.training import ScheduleConfig
from trainer.errors import OptimizerError


def warmup_steps(steps: int, schedule: ScheduleConfig) -> int:
    """Return number of warm-up steps in a run of `steps`.

    `max(warmup_fraction · steps, min(min_warmup_steps, min_warmup_limit · steps))`.

    Raises:
        OptimizerError: The warm-up would fill the whole run, so that the peak is never reached.
    """
    floor = min(schedule.min_warmup_steps, math.floor(schedule.min_warmup_limit * steps))
    warmup = max(round(schedule.warmup_fraction * steps), floor)
    if warmup >= steps:
        raise OptimizerError(
            f"learning-rate schedule: a run of {steps} steps would spend {warmup} of them warming up; lower "
            f"warmup_fraction ({schedule.warmup_fraction}) or min_warmup_limit ({schedule.min_warmup_limit})."
        )
    return warmup


def thaw_fraction(step: int, steps: int, thaw: int, schedule: ScheduleConfig) -> float:
    """Further factor on the rates of layers that rested for the first `thaw` steps of a run.

    Their averages are empty when they wake, in the middle of a schedule that was warmed up for others: so
    they warm up on their own, linearly, as long as a run of the remaining steps would.

    Args:
        step: Index of the step about to be taken, counted from 0.
        steps: Length of the run.
        thaw: Steps that they rest; 0 where nothing rests.
        schedule: The shape.

    Returns:
        A number in (0, 1]; 1 while they rest, and where nothing rests.

    Raises:
        OptimizerError: The warm-up fills the rest of the run.
    """
    if not thaw or step < thaw:
        return 1.0
    warmup = warmup_steps(steps - thaw, schedule)
    return min(1.0, (step - thaw + 1) / warmup) if warmup else 1.0


def lr_fraction(step: int, steps: int, schedule: ScheduleConfig) -> float:
    """Fraction of its peak learning rate that every parameter group uses in one step.

    Linear warm-up, then the chosen decay. The first step already moves (1/warm-up of the peak) and the last
    one runs at `min_lr_fraction`: the value of Megatron's `OptimizerParamScheduler` after `step + 1` of
    `steps` steps.

    Args:
        step: Index of the step about to be taken, counted from 0.
        steps: Length of the run.
        schedule: The shape.

    Returns:
        A number in [0, 1].

    Raises:
        OptimizerError: The step is outside the run, or the warm-up fills it.
    """
    if not 0 <= step < steps:
        raise OptimizerError(f"learning-rate schedule: step {step} is outside a run of {steps} steps.")
    warmup = warmup_steps(steps, schedule)
    done = step + 1
    if done <= warmup:
        return done / warmup
    if schedule.kind == "constant":
        return 1.0
    ratio = (done - warmup) / (steps - warmup)
    shape = 0.5 * (math.cos(math.pi * ratio) + 1.0) if schedule.kind == "cosine" else 1.0 - ratio
    return schedule.min_lr_fraction + (1.0 - schedule.min_lr_fraction) * shape
