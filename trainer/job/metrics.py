"""What a run reports while it works: `metrics.jsonl`."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from trainer.contract.json_text import parse_json

Value = float | int | str | bool | None


class MetricsLog:
    """Appends one JSON object per logged step to `metrics.jsonl`.

    A resumed run starts from a checkpoint that may lie behind the last line written before a crash. Opening
    the log therefore drops the lines past that step (and a line torn by the crash), so that the file always
    tells the one run that led to the present state and no step stands in it twice.

    Args:
        path: The file.
        resume_step: Step of the checkpoint the run goes on from; 0 starts the file anew.
    """

    def __init__(self, path: Path, *, resume_step: int = 0) -> None:
        self.path = path
        kept = [line for line, step in _lines(path) if step <= resume_step] if resume_step else []
        scratch = path.with_name(f".{path.name}.tmp")
        with scratch.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
        self._file: IO[str] = path.open("a", encoding="utf-8")

    def write(self, step: int, values: Mapping[str, Value]) -> None:
        """Append `{"step": step, **values}` and flushes, so that a follower of the file sees it at once.

        Args:
            step: 1-based number of the optimizer step just taken; 0 for what is measured before the first.
            values: Flat mapping; floats must be finite (a run with a non-finite loss stops instead of
                logging it).

        Raises:
            ValueError: A value is NaN or infinite.
        """
        self._file.write(json.dumps({"step": step, **values}, allow_nan=False) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Flush to the disk and close."""
        self._file.flush()
        os.fsync(self._file.fileno())
        self._file.close()


def _lines(path: Path) -> list[tuple[str, int]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            step = parse_json(line)["step"]
        except (ValueError, KeyError, TypeError):
            continue  # the line a crash tore
        if line.endswith("\n"):
            found.append((line, int(step)))
    return found
