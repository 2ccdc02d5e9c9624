"""Does a resumed run equal the continued one? Repeats the end of a run from its checkpoint and compares."""

import gc
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch

from trainer.checkpoints.difference import largest_difference
from trainer.checkpoints.resume import Checkpoints
from trainer.job.distributed import agree, random_state
from trainer.train.engine import Engine, closed_on_failure

NOT_COMPARABLE = sys.float_info.max
"""Stands for an infinite or undefined difference, which JSON cannot hold."""


@dataclass(frozen=True)
class Drift:
    """How far a resumed run ended from the continued run.

    Attributes:
        resumed_from: Step of the checkpoint that was resumed.
        compared_at: Step whose state was compared.
        max_abs_difference: Largest absolute difference over parameters, buffers, master weights and optimizer
            state; 0.0 means equal bit for bit.
        state_equal: Whether samplers, token counts, schedule and all random states are equal too.
    """

    resumed_from: int
    compared_at: int
    max_abs_difference: float
    state_equal: bool

    def describe(self) -> dict[str, Any]:
        """As plain values."""
        return asdict(self)

    def __str__(self) -> str:
        state = "equal" if self.state_equal else "DIFFERENT"
        return (
            f"resume check: steps {self.resumed_from}..{self.compared_at} repeated from their checkpoint, "
            f"largest difference {self.max_abs_difference}, samplers and random states {state}"
        )


def resume_drift(fresh: Callable[[], Engine], checkpoints: Checkpoints, start: int, end: int) -> Drift:
    """Resume a checkpoint in a new engine, train on and compare with the checkpoint of the later step.

    Nothing is written: the checkpoints are only read. Equal bits can be asked only of steps that round alike:
    those from `start` to `end` must have been run under this process's layout, which `Run.go_on` sees to.

    Args:
        fresh: Makes an engine, its weights still to be loaded, as a new process would; the former one must be
            gone, so that one model is in memory.
        checkpoints: Holds both steps.
        start: Step to resume.
        end: Step to compare at.
    """
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    engine = fresh()
    with closed_on_failure(engine):
        engine.resume(checkpoints, start)
        while engine.iteration < end:
            engine.step()
        device = checkpoints.layout.device
        stored, _ = checkpoints.read(end)
        checkpoints.verify(end)  # a damaged file is no drift, and has a remedy of its own
        ours = engine.run_state()
        different = (
            dict(ours.samplers) != dict(stored.samplers)
            or dict(ours.schedule) != dict(stored.schedule)
            or ours.progress["tokens"] != stored.progress["tokens"]
            or random_state(device) != checkpoints.random_state(end)
        )
        difference = largest_difference(engine.flat_tensors(), checkpoints.path(end))
    engine.close()
    return Drift(start, end, min(difference, NOT_COMPARABLE), not agree(different))
