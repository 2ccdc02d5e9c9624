"""A timeline of Nsight Systems: the timed steps of a profile in a process of their own, before the profile.

Nsight Systems and torch's profiler both want CUPTI to themselves, and a recorded step takes longer than one
that is not: the figures of the report come from a second process, which nobody records.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING

from trainer.profiling.recorded import UNDER_NSYS

if TYPE_CHECKING:
    from trainer.contract.schema.job import Job

TIMELINE = "timeline"


def record(job: "Job") -> None:
    """Run a job's timed steps under Nsight Systems; its timeline stays among the traces of the job.

    Raises:
        ConfigError: It is not installed, or there is nothing for it to see.
        ProfileError: It ended without a timeline.
    """
    from trainer.contract.schema.base import ConfigError, plain
    from trainer.errors import ProfileError

    program = shutil.which("nsys")
    if program is None:
        raise ConfigError("--nsys: no program nsys here; install Nsight Systems, or leave --nsys out")
    if job.execution.device != "cuda":
        raise ConfigError("--nsys: it records a GPU, and the device is cpu; leave --nsys out")
    if job.execution.nproc > 1:
        raise ConfigError(
            f"--nsys: it records one process, and this job has {job.execution.nproc}; leave --nsys out, or "
            "ask for one rank"
        )
    traces = Path(job.work_dir) / ".traces"
    traces.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="recorded_", dir=traces) as scratch:
        file = Path(scratch) / "job.json"
        places = {"work_dir": str(Path(scratch) / "work"), "output_dir": scratch}
        file.write_text(json.dumps(plain(job) | places), encoding="utf-8")
        recorded = subprocess.run(
            [
                program,
                "profile",
                "--trace=cuda,nvtx",
                "--cuda-graph-trace=node",
                "--capture-range=cudaProfilerApi",
                "--capture-range-end=stop",
                f"--output={traces / TIMELINE}",
                "--force-overwrite=true",
                *(sys.executable, "-m", "trainer", "profile", "--job", str(file)),
            ],
            env=os.environ | {UNDER_NSYS: "1"},
            check=False,
        )
    left = list(traces.glob(f"{TIMELINE}.*"))
    if recorded.returncode or not left:
        raise ProfileError(
            f"nsys ended with exit code {recorded.returncode} and left {'a' if left else 'no'} timeline in "
            f"{traces}; what it said stands above. Leave --nsys out for the figures alone"
        )
