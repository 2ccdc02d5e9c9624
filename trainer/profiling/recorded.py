"""Whether Nsight Systems records this process, which `trainer.profiling.nsys` then has started for that."""

import os

UNDER_NSYS = "VPMOE_UNDER_NSYS"


def under_nsys() -> bool:
    """Whether it does."""
    return UNDER_NSYS in os.environ
