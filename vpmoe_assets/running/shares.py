"""Shares of a teacher's scores at work: several processes in one work area, summed up."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from vpmoe_assets.resources.at_work import Job, job_in
from vpmoe_assets.resources.worker_places import places


@dataclass(frozen=True)
class Shares:
    """Processes that score for one job.

    Attributes:
        alive: Those at work.
        of: All of them.
        done: Conversations that they have scored.
        per_s: Conversations a second, of those at work.
        tokens_per_s: Tokens a second, likewise.
        silent_s: Seconds since the last heartbeat of any.
    """

    alive: int
    of: int
    done: int
    per_s: float
    tokens_per_s: float
    silent_s: float | None


def shares(work: Path) -> Shares | None:
    """Return the shares in a work area; None where none is at work."""
    told = [job for place in places(work) if (job := job_in(place)) is not None]
    alive = [job for job in told if job.alive]
    if not alive:
        return None
    return _summed(told, alive)


def alone(job: Job) -> Shares:
    """Return the same of a job that scores by itself."""
    return _summed([job], [job])


def left_s(found: Shares, job: Mapping[str, Any]) -> float | None:
    """Return how long the rest takes at the pace of the last pieces, in seconds; None where nobody can tell.

    Args:
        found: At work.
        job: The job file.
    """
    try:
        root = Path(job["inputs"]["synth_kd_v1"]["path"])
        fraction = float(job["recipe"]["subset_fraction"])
        beside = [place / "manifest.json" for place in (root, root.parent)]
        splits = orjson.loads(next(path for path in beside if path.is_file()).read_bytes())["splits"]
        total = splits["train"]["rows"] * fraction + splits["valid"]["rows"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    return float(max(0.0, total - found.done) / found.per_s) if found.per_s > 0 else None


def _summed(told: Sequence[Job], alive: Sequence[Job]) -> Shares:
    per_s = tokens = 0.0
    for job in alive:
        if isinstance(seconds := job.last.get("seconds"), int | float) and seconds > 0:
            per_s += job.last.get("conversations", 0) / seconds
            tokens += job.last.get("tokens", 0) / seconds
    heard = [job.silent_s for job in alive if job.silent_s is not None]
    done = sum(map(_conversations, told))
    return Shares(len(alive), len(told), done, per_s, tokens, min(heard, default=None))


def _conversations(job: Job) -> int:
    count = 0
    try:
        lines = job.metrics.read_bytes().splitlines()
    except OSError:
        return 0
    for line in lines:
        try:
            count += orjson.loads(line)["conversations"]
        except (orjson.JSONDecodeError, KeyError, TypeError):
            continue
    return count
