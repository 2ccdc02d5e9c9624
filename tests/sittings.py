"""Proofs that take longer than one sitting: what came of each part stands in a file, a JSON line each."""

import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def read(results: Path) -> list[dict[str, Any]]:
    """Return what is in a file of results; nothing where there is none."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


def latest(results: Iterable[dict[str, Any]], *keys: str) -> dict[Any, dict[str, Any]]:
    """Return what last came of each part.

    Args:
        results: In the order in which they came.
        keys: Whose values, a tuple, name a part.
    """
    return {tuple(each[key] for key in keys): each for each in results}


def in_memory() -> str | None:
    """Return a directory in memory, where there is one, for what is written and read many times."""
    return "/dev/shm" if Path("/dev/shm").is_dir() else None


def add(results: Path, result: dict[str, Any]) -> None:
    """Append what came of one part."""
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(result) + "\n")


def commit() -> str:
    """Return the commit of the sources, with a mark where they differ from it."""
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True).stdout
    dirty = subprocess.run(
        [*git, "status", "--porcelain", "trainer", "vpmoe_assets"], capture_output=True, text=True
    ).stdout
    return head.strip() + ("+" if dirty else "")
