"""Nsight Systems around a profile: the same command again, recorded from the first timed step to the last."""

import os
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from trainer.profiling.recorded import UNDER_NSYS

if TYPE_CHECKING:
    from trainer.contract.schema.job import Job


def start_again(job: "Job") -> NoReturn:
    """Start the same command again under Nsight Systems, which records the timed steps.

    Raises:
        ConfigError: It is not installed, or there is nothing for it to see.
    """
    from trainer.contract.schema.base import ConfigError

    program = shutil.which("nsys")
    if program is None:
        raise ConfigError("--nsys: no program nsys here; install Nsight Systems, or leave --nsys out")
    if job.execution.device != "cuda":
        raise ConfigError("--nsys: it records a GPU, and the device is cpu; leave --nsys out")
    traces = Path(job.work_dir) / ".traces"
    traces.mkdir(parents=True, exist_ok=True)
    command = [
        program,
        "profile",
        "--trace=cuda,nvtx",
        "--cuda-graph-trace=node",
        "--capture-range=cudaProfilerApi",
        "--capture-range-end=stop",
        f"--output={traces / 'timeline'}",
        "--force-overwrite=true",
        sys.executable,
        "-m",
        "trainer",
        *sys.argv[1:],
        *(["--output", job.output_dir] if "--job" not in sys.argv and "--output" not in sys.argv else []),
    ]
    os.execve(program, command, os.environ | {UNDER_NSYS: "1"})
