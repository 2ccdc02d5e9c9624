"""The trainer's files, followed while it writes them: metrics become observations, the log becomes messages.

Memory stays flat however long a run is: at most one block and one unfinished line are held.
"""

import math
import os
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import dagster as dg
import orjson

from trainer.contract.credentials import redact

_BLOCK = 1 << 20
_LONGEST_LINE = 16 << 20

MAX_OBSERVATIONS = 200
_HELD_OUT_SHARE = 0.2
_HELD_OUT_PREFIX = "heldout"
_FILE_ONLY = (
    "moe/router/layer_",
    "absent/",
    "tokens/",
    "samples/",
    "weight/",
    "consumed_samples",
    "epoch",
    "heldout_tokens",
)
"""Prefixes of what stays in the file: hundreds of values per layer, and bookkeeping that nobody plots."""


class FileTail:
    """Complete lines of a file that another process appends to, truncates or replaces.

    A last line without its newline waits until the rest of it is there. When the file has become shorter, or
    another file has taken its place, reading starts over.

    Args:
        path: The file; it need not exist yet.
        from_end: Skips what is in the file now.
    """

    def __init__(self, path: Path, *, from_end: bool = False) -> None:
        self.path = path
        self._offset = 0
        self._rest = b""
        self._inode: int | None = None
        if from_end and path.exists():
            found = path.stat()
            self._inode, self._offset = found.st_ino, found.st_size

    def lines(self) -> Iterator[bytes]:
        """Return what was completed since the last call, without newlines.

        Raises:
            ValueError: A line is longer than 16 MiB; the file is not what it should be.
        """
        try:
            file = self.path.open("rb")
        except FileNotFoundError:
            return
        with file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._inode or found.st_size < self._offset:
                self._inode, self._offset, self._rest = found.st_ino, 0, b""
            file.seek(self._offset)
            while block := file.read(_BLOCK):
                self._offset += len(block)
                *complete, self._rest = (self._rest + block).split(b"\n")
                if len(self._rest) > _LONGEST_LINE:
                    raise ValueError(f"{self.path}: a line of more than {_LONGEST_LINE} bytes")
                yield from complete


class LogSpaced:
    """Chooses from growing steps so that early ones come one by one and late ones far apart.

    Args:
        count: How many to choose at most.
        last: Last step that will come, or None where nobody knows; then the ratio of neighbours is 1.07.
        after: Steps up to this one are not wanted.
    """

    def __init__(self, count: int, *, last: int | None = None, after: int = -1) -> None:
        self._left = count
        self._next = after + 1
        span = None if last is None else max(1, last - after)
        self._ratio = 1.07 if span is None else _ratio(span, count)
        self._after = after

    def wants(self, step: int) -> bool:
        """Whether to take this step; steps must grow from call to call."""
        if self._left == 0 or step < self._next:
            return False
        self._left -= 1
        self._next = max(step + 1, self._after + math.ceil((step - self._after) * self._ratio))
        return True


class EvenlySpaced:
    """Chooses from growing steps at even distances.

    Args:
        count: How many to choose at most.
        last: Last step that will come.
        after: Steps up to this one are not wanted.
    """

    def __init__(self, count: int, *, last: int, after: int = -1) -> None:
        self._left = count
        self._next = float(after + 1)
        self._distance = (last - after) / count

    def wants(self, step: int) -> bool:
        """Whether to take this step; steps must grow from call to call."""
        if self._left == 0 or step < self._next:
            return False
        self._left -= 1
        self._next = max(self._next + self._distance, step + self._distance / 2)
        return True


def _ratio(span: int, count: int) -> float:
    """Smallest ratio of neighbours, at least one step apart, with which `count` of them pass `span`."""

    def needed(ratio: float) -> int:
        step, used = 1, 0
        while step <= span and used <= count:
            step, used = max(step + 1, math.ceil(step * ratio)), used + 1
        return used

    low, high = 1.0, 2.0
    while needed(high) > count:
        high *= 2.0
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (low, middle) if needed(middle) <= count else (middle, high)
    return high


class MetricsTail:
    """Follows `metrics.jsonl` and picks what the UI draws while the job runs.

    Held-out values come seldom and would be lost between the chosen training steps, so they have a share of
    the observations for themselves, evenly spread. A step is shown once, also when a resumed run logs it
    again: it has the same values.

    Args:
        path: The file.
        total_steps: Steps of the whole run, or None where the job has none.
        after_step: Step the run goes on from; what was logged up to there was shown by the run before.
        limit: Observations at most.
    """

    def __init__(
        self,
        path: Path,
        *,
        total_steps: int | None = None,
        after_step: int = -1,
        limit: int = MAX_OBSERVATIONS,
    ) -> None:
        self._tail = FileTail(path, from_end=True)
        held_out = max(1, int(limit * _HELD_OUT_SHARE))
        self._training = LogSpaced(limit - held_out, last=total_steps, after=after_step)
        self._held_out: LogSpaced | EvenlySpaced = (
            LogSpaced(held_out, after=after_step)
            if total_steps is None
            else EvenlySpaced(held_out, last=total_steps, after=after_step)
        )

    def observations(self, key: dg.AssetKey) -> Iterator[dg.AssetObservation]:
        """Return what was logged since the last call and is to be shown."""
        for line in self._tail.lines():
            record = _parsed(line)
            if record is None:
                continue
            held_out = any(name.startswith(_HELD_OUT_PREFIX) for name in record)
            if (self._held_out if held_out else self._training).wants(record["step"]):
                yield dg.AssetObservation(asset_key=key, metadata=_shown(record))


def _parsed(line: bytes) -> dict[str, Any] | None:
    """Return a metrics record, or None for a line that a crash tore."""
    try:
        record = orjson.loads(line)
    except orjson.JSONDecodeError:
        return None
    return record if isinstance(record, dict) and isinstance(record.get("step"), int) else None


def _shown(record: Mapping[str, Any]) -> dict[str, dg.MetadataValue]:
    """Return the numbers of a record that are worth a plot."""
    shown: dict[str, dg.MetadataValue] = {}
    for name, value in record.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or name.startswith(_FILE_ONLY):
            continue
        shown[name] = dg.MetadataValue.int(value) if isinstance(value, int) else dg.MetadataValue.float(value)
    return shown


class LogTail:
    """Follows a log and hands out what is new in blocks that an event log can carry.

    Args:
        path: The file.
        most: Lines of one block at most; the last ones are kept and the block says how many are missing.
    """

    def __init__(self, path: Path, *, most: int = 40) -> None:
        self._tail = FileTail(path, from_end=True)
        self._most = most

    def block(self) -> str:
        """Return new lines as one text, without credentials; empty where there are none."""
        shown: str = redact(
            _clipped((line.decode(errors="replace") for line in self._tail.lines()), self._most)
        )
        return shown


def last_lines(path: Path, count: int) -> str:
    """Return the last `count` lines of a text file without credentials; empty where there is no file."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - _BLOCK))
            text = file.read().decode(errors="replace")
    except FileNotFoundError:
        return ""
    shown: str = redact("\n".join(text.splitlines()[-count:]))
    return shown


def _clipped(lines: Iterable[str], most: int) -> str:
    kept: deque[str] = deque(maxlen=most)
    seen = 0
    for line in lines:
        kept.append(line.rstrip("\r"))
        seen += 1
    missing = [f"… {seen - most} lines are only in the file …"] if seen > most else []
    return "\n".join([*missing, *kept])
