"""Render `RESULTS.md` from `results.jsonl`: the newest result of each benchmark on each machine.

python -m benchmarks.render
"""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS

REPORT = RESULTS.with_name("RESULTS.md")
FIELDS = ("name", "value", "unit", "comparator", "ratio", "commit", "machine", "gpu", "versions", "time")
_HEAD = """# Benchmark results

Rendered from `results.jsonl` by `make results`; edit neither. Each row is the newest result of a benchmark
on a machine. *Ratio* is the value over its comparator, both measured in the same run; more is better.
`NOTES.md` explains.
"""


def read(path: Path = RESULTS) -> list[dict[str, Any]]:
    """Parse the results.

    Raises:
        ValueError: A line is not JSON or lacks a field; the message has its number.
    """
    results = []
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            result = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: not valid JSON ({error})") from error
        if missing := [field for field in FIELDS if field not in result]:
            raise ValueError(f"{path}, line {number}: no {', '.join(missing)}")
        results.append(result)
    return results


def render(results: Iterable[dict[str, Any]]) -> str:
    """Markdown of the newest result per benchmark and machine; the same results give the same text."""
    history: dict[tuple[str, str, str], list[dict[str, Any]]] = {}
    for result in results:
        key = (result["name"], result["machine"], result["gpu"] or "")
        history.setdefault(key, []).append(result)
    if not history:
        return f"{_HEAD}\nNo results yet.\n"
    parts = [_HEAD]
    for where in sorted({key[1:] for key in history}):
        device, graphics = where
        parts += [
            f"\n## {device}{f', {graphics}' if graphics else ''}\n",
            "| benchmark | value | ratio | comparator | commit | date | torch | results |",
            "|---|---:|---:|---|---|---|---|---:|",
        ]
        for key in sorted(key for key in history if key[1:] == where):
            # Lines are in the order of writing, so the last of equal times is the newest.
            newest = max(enumerate(history[key]), key=lambda item: (item[1]["time"], item[0]))[1]
            parts.append(_row(newest, len(history[key])))
    return "\n".join(parts) + "\n"


def _row(result: dict[str, Any], count: int) -> str:
    ratio = "" if result["ratio"] is None else f"{result['ratio']:.3g}×"
    dirty = "+" if result["commit"].endswith("+") else ""
    cells = (
        result["name"],
        f"{_number(result['value'])} {result['unit']}",
        ratio,
        result["comparator"] or "",
        f"`{result['commit'][:8]}{dirty}`",
        result["time"][:10],
        result["versions"].get("torch", ""),
        str(count),
    )
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def main() -> None:
    """Write the report beside the results."""
    REPORT.write_text(render(read()), encoding="utf-8")
    print(f"{REPORT.name}: {len(read())} results")


if __name__ == "__main__":
    main()
