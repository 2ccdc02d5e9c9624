"""The starts of a job, `attempts.jsonl`: when each began, from which step, and when and how it ended.

The file is appended to and never rewritten, so that it outlives whoever was killed while writing it. A start
is two lines, one when it begins and one when it ends; without the second one, nobody was left to write it.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.contract.json_text import parse_json
from trainer.contract.status import DONE, FAILED, INTERRUPTED

KILLED = "killed"


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        started_utc: ISO 8601 with milliseconds and offset, as `ended_utc`.
        resumed_from: Step of the checkpoint that it went on from; None at the beginning.
        ended_utc: None where nobody was left to note it; of one that was killed, the last sign of life.
        ended: `done`, `interrupted`, `failed: reason` or `killed`; None while it runs.
        sources: sha256 of the snapshot that it ran from; None where it ran from a checkout.
    """

    started_utc: str
    resumed_from: int | None = None
    ended_utc: str | None = None
    ended: str | None = None
    sources: str | None = None


def begin_attempt(path: Path, resumed_from: int | None = None, sources: str | None = None) -> None:
    """Note that a job starts."""
    started = _iso(datetime.now(UTC))
    _append(path, {"started_utc": started, "resumed_from": resumed_from, "sources": sources})


def end_attempt(path: Path, ended: str, *, at_unix_s: float | None = None) -> None:
    """Note how the start that was begun last has ended; nothing where that is known.

    Args:
        path: The file.
        ended: What stands in `STATUS`, or that it was killed.
        at_unix_s: When, or its last sign of life, in seconds; by default now. A time before its beginning is
            none of its own.
    """
    known = read_attempts(path)
    if not known or known[-1].ended is not None:
        return
    at = _iso(datetime.now(UTC) if at_unix_s is None else datetime.fromtimestamp(at_unix_s, UTC))
    _append(path, {"ended_utc": at if at >= known[-1].started_utc else None, "ended": ended})


def read_attempts(path: Path) -> tuple[Attempt, ...]:
    """Return the starts, the first one first; a line that a kill has torn says nothing."""
    found: list[Attempt] = []
    for line in _lines(path):
        if isinstance(started := line.get("started_utc"), str):
            found.append(Attempt(started, line.get("resumed_from"), sources=line.get("sources")))
        elif found and found[-1].ended is None:
            found[-1] = replace(found[-1], ended_utc=line.get("ended_utc"), ended=line.get("ended"))
    return tuple(found)


@contextmanager
def attempt(
    path: Path,
    resumed_from: int | None = None,
    sources: str | None = None,
    *,
    stops: tuple[type[BaseException], ...] = (),
) -> Iterator[None]:
    """Note a start around the block.

    Args:
        path: The file.
        resumed_from: Step of the checkpoint that it goes on from.
        sources: sha256 of the snapshot that it runs from.
        stops: Exceptions by which the block says that it stopped as asked; others that are an `Exception`
            are failures.
    """
    begin_attempt(path, resumed_from, sources)
    try:
        yield
    except BaseException as error:
        stopped = isinstance(error, stops) or not isinstance(error, Exception)
        end_attempt(path, INTERRUPTED if stopped else f"{FAILED}: {_first_line(error)}")
        raise
    end_attempt(path, DONE)


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).splitlines()), type(error).__name__)


def _iso(moment: datetime) -> str:
    return moment.isoformat(timespec="milliseconds")


def _append(path: Path, line: dict[str, Any]) -> None:
    content = path.read_bytes() if path.is_file() else b""
    torn = b"\n" if content and not content.endswith(b"\n") else b""
    with path.open("ab") as file:
        file.write(torn + json.dumps(line).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def _lines(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    for text in path.read_bytes().splitlines():
        try:
            line = parse_json(text)
        except ValueError:
            continue
        # Of other things, whoever wrote it was no job.
        if isinstance(line, dict) and all(isinstance(value, str | int | None) for value in line.values()):
            yield line
