"""The jobs at work, as their work areas tell."""

import contextlib
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from trainer.contract.status import HEARTBEAT_NAME, METRICS_NAME, RUNNING, STATUS_NAME, parse_status
from vpmoe_assets.lineage.layout import directories

_SILENT_S = 60.0
"""Without a heartbeat for so long a job is hardly alive."""
_TAIL = 16384


@dataclass(frozen=True)
class Job:
    """A job that has not ended.

    Attributes:
        asset: That it makes.
        state: A word of `STATUS`.
        reason: Why it failed.
        silent_s: Seconds since its last heartbeat; None without one.
        last: The last line of its metrics.
    """

    asset: str
    state: str
    reason: str
    silent_s: float | None
    last: dict[str, Any]

    @property
    def alive(self) -> bool:
        """Whether it is at work, by its own word and its heartbeat."""
        return self.state == RUNNING and self.silent_s is not None and self.silent_s < _SILENT_S


def jobs(root: Path, experiment: str) -> list[Job]:
    """Return the jobs of an experiment whose work areas are there, the ones at work first.

    Args:
        root: Of the store.
        experiment: Name.
    """
    parent = root / ".work" / experiment
    found = [job for name in directories(parent) if (job := _job(parent / name)) is not None]
    return sorted(found, key=lambda job: (not job.alive, job.asset))


def _job(work: Path) -> Job | None:
    try:
        state, reason = parse_status((work / STATUS_NAME).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return None
    silent = None
    with contextlib.suppress(OSError):
        silent = max(0.0, time.time() - os.stat(work / HEARTBEAT_NAME).st_mtime)
    return Job(work.name.rpartition("-")[0] or work.name, state, reason, silent, _last(work / METRICS_NAME))


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
