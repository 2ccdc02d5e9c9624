"""The heartbeat of a job, told by the clock of whoever watches.

The job may run on a machine whose clock is wrong, and clocks are set. So a beat is as old as the watcher has
waited for the next one, and how long the job has been at something is what its own clock says of itself.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.json_text import parse_json


@dataclass(frozen=True)
class Beat:
    """The last heartbeat.

    Attributes:
        age_s: Time since it was seen to change, in seconds.
        phase: What the job was at, or "" where the heartbeat does not say.
        iteration: At which step, or None.
        stuck_s: Time since it got there, in seconds; 0 where the heartbeat does not say.
    """

    age_s: float
    phase: str = ""
    iteration: int | None = None
    stuck_s: float = 0.0


class Pulse:
    """Follows a heartbeat file. What is in it at the beginning was left by an earlier start, and is no beat.

    Args:
        path: The file; it need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen = self._look()
        self._changed = time.monotonic()
        self._content: dict[str, Any] = {}

    def rest(self) -> None:
        """Expect no beat until now: the job waits for its turn."""
        self._changed = time.monotonic()
        self._content = {}

    def beat(self) -> Beat:
        """Return the last heartbeat; before the first one, a beat at the beginning."""
        found = self._look()
        if found is not None and found != self._seen:
            self._seen, self._changed, self._content = found, time.monotonic(), self._read()
        age = time.monotonic() - self._changed
        written, entered = self._content.get("unix_s"), self._content.get("since_unix_s")
        stuck = 0.0
        if isinstance(written, int | float) and isinstance(entered, int | float):
            stuck = max(0.0, written - entered) + age
        return Beat(
            age_s=age,
            phase=str(self._content.get("phase", "")),
            iteration=self._content.get("iteration"),
            stuck_s=stuck,
        )

    def _look(self) -> tuple[int, int] | None:
        """Return what tells one beat from the next: the file is replaced, or touched."""
        try:
            found = self._path.stat()
        except FileNotFoundError:
            return None
        return found.st_ino, found.st_mtime_ns

    def _read(self) -> dict[str, Any]:
        try:
            content = parse_json(self._path.read_text(encoding="utf-8") or "{}")
        except (FileNotFoundError, ValueError):  # a heartbeat may be a bare `touch`
            return {}
        return content if isinstance(content, dict) else {}
