"""How far the shards of a step are, noted in its work area for whoever watches: `.shards.json`."""

import contextlib
import json
import time
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_text
from trainer.contract.json_text import parse_json
from vpmoe_assets.harmony.pool import Progress
from vpmoe_assets.resources.process_record import Orchestrator

NOTE_NAME = ".shards.json"
SCHEMA = "vpmoe.shards/1"
_EVERY_S = 1.0
_WINDOW_S = 60.0
"""The pace is that of so many seconds: what an earlier build had finished is there at once."""


class ShardProgress(Progress):
    """Rows done, shown as ever, and noted in the work area once a second.

    Args:
        label: What is being built.
        total: Rows in all.
        work: The work area.
        engine: That works on the shards.
    """

    def __init__(self, label: str, total: int, work: Path, engine: str) -> None:
        super().__init__(label, total)
        self._note, self._engine, self._orchestrator = work / NOTE_NAME, engine, Orchestrator.this()
        self._points = deque([(time.monotonic(), 0)])
        self._tell()

    def advance(self, rows: int) -> None:
        """Count `rows` more."""
        super().advance(rows)
        if time.monotonic() - self._points[-1][0] >= _EVERY_S:
            self._tell()

    def close(self) -> None:
        """End the display, and take the note away."""
        super().close()
        self._note.unlink(missing_ok=True)

    def _tell(self) -> None:
        now = time.monotonic()
        self._points.append((now, self._rows))
        while len(self._points) > 2 and now - self._points[0][0] > _WINDOW_S:
            self._points.popleft()
        begun, before = self._points[0]
        content = {
            "schema": SCHEMA,
            "rows": self._rows,
            "total": self._total,
            "rows_per_s": (self._rows - before) / (now - begun) if now > begun else 0.0,
            "engine": self._engine,
            "orchestrator": asdict(self._orchestrator),
        }
        with contextlib.suppress(OSError):  # a display: no build ends for it
            replace_text(self._note, json.dumps(content) + "\n", durable=False)


@dataclass(frozen=True)
class ShardsAtWork:
    """Shards at work, as their note says.

    Attributes:
        rows: Done.
        total: In all.
        rows_per_s: Pace of the last minute.
        engine: That works on them.
        orchestrator: Whose they are.
        silent_s: Seconds since the note was written, by this machine's clock.
    """

    rows: int
    total: int
    rows_per_s: float
    engine: str
    orchestrator: Orchestrator
    silent_s: float

    @property
    def left_s(self) -> float | None:
        """Seconds that the rest takes at this pace; None where none is known yet."""
        return max(0, self.total - self.rows) / self.rows_per_s if self.rows_per_s > 0 else None


def shards_at_work(work: Path) -> ShardsAtWork | None:
    """Return what is noted in a work area; None where nothing is, or its orchestrator is known to be gone."""
    path = work / NOTE_NAME
    try:
        content: dict[str, Any] = parse_json(path.read_text(encoding="utf-8"))
        if content["schema"] != SCHEMA:
            return None
        found = ShardsAtWork(
            rows=int(content["rows"]),
            total=int(content["total"]),
            rows_per_s=float(content["rows_per_s"]),
            engine=str(content["engine"]),
            orchestrator=Orchestrator(**content["orchestrator"]),
            silent_s=max(0.0, time.time() - path.stat().st_mtime),
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return None if found.orchestrator.dead else found
