"""What the ranks of the training tests do; importable by name, as a fork server needs."""

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load_file

from tests.trainer.metric_rows import read_metrics
from trainer.checkpoints.resume import Checkpoints, TorchDistSave
from trainer.contract.schema.job import Job
from trainer.job.lifecycle import Interrupted, run_job
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir
from trainer.train.engine import Engine
from trainer.train.run import Run, train


def run_train(job: Job, verify: bool = False) -> int:
    """A job from start to exit code, as `python -m trainer train` runs it."""
    return run_job(job, lambda j, work, stop: train(j, work, stop, verify_resume=verify))


class HoldingSave(TorchDistSave):
    """Writes all of a checkpoint's tensors, says so, and waits to be killed before the rename."""

    hold_at: int = 0
    said: Path

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        super().save(sharded_state_dict, checkpoint_dir)
        if Path(checkpoint_dir).name.endswith(f"iter_{self.hold_at:07d}"):
            self.said.touch()
            time.sleep(600)


def train_holding_save(job: Job, hold_at: int, said: Path) -> int:
    """Trains until the save of a step is half done, then waits there."""
    HoldingSave.hold_at, HoldingSave.said = hold_at, said
    Checkpoints.strategy = HoldingSave
    return run_train(job)


class SlowSave(TorchDistSave):
    """A checkpoint that takes long to write."""

    seconds = 0.0

    def save(self, sharded_state_dict: dict[str, Any], checkpoint_dir: Path) -> None:
        time.sleep(self.seconds)
        super().save(sharded_state_dict, checkpoint_dir)


def train_slow_saves(job: Job, seconds: float) -> int:
    """Trains with saves of at least `seconds`."""
    SlowSave.seconds = seconds
    Checkpoints.strategy = SlowSave
    return run_train(job)


def train_holding_step(job: Job, hold_at: int, said: Path) -> int:
    """Trains until the end of a step, before its save, and waits there."""
    step: Callable[..., Any] = Engine.step

    def held(self: Engine, **options: Any) -> Any:
        result = step(self, **options)
        if result.step == hold_at:
            said.touch()
            time.sleep(600)
        return result

    Engine.step = held  # type: ignore[method-assign]
    return run_train(job)


def train_until(job: Job, last: int, verify: bool = True) -> int:
    """Trains and asks for a stop, as a signal would, after step `last`; the last one ends unpublished."""
    step: Callable[..., Any] = Engine.step
    asked: list[StopRequest] = []

    def stopping(self: Engine, **options: Any) -> Any:
        result = step(self, **options)
        if result.step == last and os.environ.get("RANK", "0") == os.environ.get("STOP_RANK", "0"):
            asked[0].request("a test")
        return result

    def work(j: Job, directory: WorkDir, stop: StopRequest) -> None:
        asked.append(stop)
        train(j, directory, stop, verify_resume=verify)

    def stopped(self: Run, engine: Engine) -> list[str]:
        raise Interrupted("killed before it published")

    publish = Run.publish
    Engine.step = stopping  # type: ignore[method-assign]
    if last >= job.train_recipe().steps:
        Run.publish = stopped  # type: ignore[method-assign]
    try:
        return run_job(job, work)
    finally:
        Engine.step = step  # type: ignore[method-assign]
        Run.publish = publish  # type: ignore[method-assign]


def wait_for(path: Path, seconds: float = 90.0) -> None:
    """Waits until a file is there."""
    wait_until(path.exists, str(path), seconds)


def wait_until(there: Callable[[], bool], what: str, seconds: float = 90.0) -> None:
    """Waits until something is the case."""
    end = time.monotonic() + seconds
    while not there():
        assert time.monotonic() < end, f"{what} did not appear in {seconds} s"
        time.sleep(0.05)


def losses(job: Job) -> list[float]:
    """The training losses a job logged, in order of steps."""
    rows = read_metrics(Path(job.work_dir) / "metrics.jsonl")
    assert [row["step"] for row in rows] == sorted({row["step"] for row in rows})
    return [float(row["loss"]) for row in rows if "loss" in row]  # type: ignore[arg-type]


def weights(job: Job) -> dict[str, np.ndarray]:
    """The published weights of a job."""
    files = sorted((Path(job.output_dir) / "payload").glob("*.safetensors"))
    return {name: value for file in files for name, value in load_file(file).items()}


def payload_bytes(job: Job) -> dict[str, bytes]:
    """Every published file of a job."""
    return {path.name: path.read_bytes() for path in sorted((Path(job.output_dir) / "payload").iterdir())}
