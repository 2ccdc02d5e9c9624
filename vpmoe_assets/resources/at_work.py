"""The jobs at work, as their work areas tell."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from trainer.contract.credentials import without_credentials
from trainer.contract.status import (
    DONE,
    HEARTBEAT_NAME,
    JOB_NAME,
    METRICS_NAME,
    RUNNING,
    STATUS_NAME,
    parse_status,
)
from vpmoe_assets.lineage.layout import directories

SILENT_S = 60.0
"""Without a heartbeat for so long a job is hardly alive."""
_PUBLISHING_S = 600.0
"""A work area without a job that changed so recently may be on its way to its place."""
_TAIL = 16384


@dataclass(frozen=True)
class Job:
    """A job whose work area is there.

    Attributes:
        asset: That it makes.
        work: Its directory.
        state: A word of `STATUS`.
        reason: Why it failed.
        phase: What it is at, by its heartbeat.
        silent_s: Seconds since its last heartbeat; None without one.
        steps: That it takes in all; None where it takes none.
        last: The last line of its metrics.
    """

    asset: str
    work: Path
    state: str
    reason: str
    phase: str
    silent_s: float | None
    steps: int | None
    last: dict[str, Any]

    @property
    def alive(self) -> bool:
        """Whether it is at work, by its own word and its heartbeat."""
        return self.state == RUNNING and self._heard

    @property
    def moving(self) -> bool:
        """Whether a look a moment later may show something else: it works, or its result is published."""
        return self.state in (RUNNING, DONE) and self._heard

    @property
    def left_s(self) -> float | None:
        """Seconds that its further steps take, at the pace of the last one."""
        step, pace = self.last.get("step"), self.last.get("step_ms")
        if self.steps is None or not isinstance(step, int) or not isinstance(pace, int | float):
            return None
        return max(0, self.steps - step) * pace / 1000

    @property
    def metrics(self) -> Path:
        """The file with its points."""
        return self.work / METRICS_NAME

    @property
    def _heard(self) -> bool:
        return self.silent_s is not None and self.silent_s < SILENT_S


def jobs(root: Path, experiment: str) -> list[Job]:
    """Return the jobs of an experiment whose work areas are there, the ones at work first.

    Args:
        root: Of the store.
        experiment: Name.
    """
    parent = root / ".work" / experiment
    found = [job for name in directories(parent) if (job := job_in(parent / name)) is not None]
    return sorted(found, key=lambda job: (not job.alive, job.asset))


def publishing(root: Path, experiment: str, asset: str) -> bool:
    """Whether something may be on its way from a work area, whose job has ended, to its place as a version.

    Args:
        root: Of the store.
        experiment: Name, of one that is in the store.
        asset: Name.
    """
    parent = root / ".work" / experiment
    for name in directories(parent):
        with contextlib.suppress(OSError):
            if name.rpartition("-")[0] == asset:
                return time.time() - os.stat(parent / name).st_mtime < _PUBLISHING_S
    return False


def job_in(work: Path) -> Job | None:
    """Return the job of a work directory; None where none has begun in it.

    Args:
        work: The directory.
    """
    try:
        state, reason = parse_status((work / STATUS_NAME).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    silent = None
    with contextlib.suppress(OSError):
        silent = max(0.0, time.time() - os.stat(work / HEARTBEAT_NAME).st_mtime)
    recipe = _object(work / JOB_NAME).get("recipe")
    steps = recipe.get("steps") if isinstance(recipe, dict) else None
    return Job(
        asset=work.name.rpartition("-")[0] or work.name,
        work=work,
        state=state,
        reason=without_credentials(reason),
        phase=str(_object(work / HEARTBEAT_NAME).get("phase", "")),
        silent_s=silent,
        steps=steps if isinstance(steps, int) else None,
        last=_last(work / METRICS_NAME),
    )


def file_of(work: Path) -> dict[str, Any]:
    """Return the job file of a work directory; an empty one where there is none."""
    return _object(work / JOB_NAME)


def _object(path: Path) -> dict[str, Any]:
    """Return a JSON object; an empty one where there is none, or only half of one."""
    with contextlib.suppress(OSError, orjson.JSONDecodeError):
        found = orjson.loads(path.read_bytes())
        if isinstance(found, dict):
            return found
    return {}


def _last(metrics: Path) -> dict[str, Any]:
    """Return the last whole line of a metrics file."""
    try:
        with metrics.open("rb") as file:
            file.seek(0, os.SEEK_END)
            file.seek(max(0, file.tell() - _TAIL))
            lines = file.read().split(b"\n")[:-1]
    except OSError:
        return {}
    for line in reversed(lines):
        with contextlib.suppress(orjson.JSONDecodeError):
            point = orjson.loads(line)
            if isinstance(point, dict):
                return point
    return {}
