"""A tiny profile, in this process."""

from pathlib import Path
from typing import Any

from tests.trainer.train.train_jobs import tiny_recipe
from trainer.contract.schema.base import parse
from trainer.contract.schema.job import Job
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.profiling.profile import profile


def profile_job(base: Path, **changes: Any) -> Job:
    """A `profile` job of a model of four layers; `changes` of its recipe by dotted key."""
    recipe = tiny_recipe(**{"training.global_batch_size": 2, **changes})
    recipe |= {"warm_up_steps": 1, "timed_steps": 2, "steps": 6}
    return parse(
        Job,
        {
            "command": "profile",
            "asset": "perf_profile",
            "experiment": "smoke",
            "recipe": recipe,
            "recipe_fingerprint": "f" * 64,
            "seed": 1234,
            "inputs": {},
            "execution": {"device": "cpu"},
            "provenance": {
                "git_sha": "a" * 40,
                "git_dirty": False,
                "source_digest": "s",
                "lock_digest": "l",
            },
            "work_dir": str(base / "work"),
            "output_dir": str(base / "out"),
        },
    )


def run(job: Job, *, keep_traces: bool = False) -> None:
    """Run a profile as `python -m trainer profile` does, without the life of a job around it."""
    profile(job, WorkDir(Path(job.work_dir)), StopRequest(), keep_traces=keep_traces)
