"""Proofs that take longer than one sitting: what came of each part stands in a file, a JSON line each."""

import json
import subprocess
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


def read(results: Path) -> list[dict[str, Any]]:
    """Return what is in a file of results; nothing where there is none."""
    return [json.loads(line) for line in results.read_text().splitlines()] if results.exists() else []


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
