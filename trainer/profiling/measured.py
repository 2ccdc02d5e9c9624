"""What a profile found, before it is a report."""

from dataclasses import dataclass

from trainer.profiling.traced import Traced
from trainer.train.engine import StepResult


@dataclass
class Measured:
    """What a profile found, rank by rank the same but for the time of its own device.

    Attributes:
        set_up_s: From the start of the build to the end of the first step.
        step_ms: Of each timed step.
        parts_ms: Mean milliseconds of each part of a timed step.
        steps: What each timed step reported.
        peak_bytes: Most memory that tensors took in a timed step; of the process on a CPU.
        reserved_bytes: Most that the allocator held; None on a CPU.
        graphs: Whether timed steps were replayed from CUDA graphs.
        traced: A step as it was timed, under the profiler.
        layers: A step by kinds of layers: the same one, or one without graphs.
    """

    set_up_s: float
    step_ms: list[float]
    parts_ms: dict[str, float]
    steps: list[StepResult]
    peak_bytes: int
    reserved_bytes: int | None
    graphs: bool
    traced: Traced
    layers: Traced
