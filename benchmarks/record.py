"""The memory of benchmarks: one JSON line per result, appended to `results.jsonl`.

A speed means nothing by itself, so a result names its comparator, measured in the same run, and their ratio;
and commit, machine, GPU and versions, so that two lines can be told apart later.

    python -m benchmarks.record NAME VALUE UNIT [--comparator TEXT --ratio X]
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.git import git

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results.jsonl"
PACKAGES = (
    "dagster",
    "duckdb",
    "megatron-core",
    "numpy",
    "openai-harmony",
    "pyarrow",
    "tiktoken",
    "torch",
    "triton",
)


def record(
    name: str,
    value: float,
    unit: str,
    *,
    comparator: str | None = None,
    ratio: float | None = None,
    details: dict[str, Any] | None = None,
    path: Path = RESULTS,
) -> dict[str, Any]:
    """Append one result.

    Args:
        name: Of the benchmark; the same measurement keeps the same name for ever.
        value: Measured, finite.
        unit: Of the value (`"rows/s"`).
        comparator: What it was compared with, in the same run.
        ratio: Value over the comparator's, in the sense that more is better; given with the comparator.
        details: Anything else worth keeping, JSON values.
        path: The file to append to.

    Returns:
        The line as written.

    Raises:
        ValueError: Empty name or unit, a number that is not finite, or a comparator without ratio.
    """
    if not name or not unit:
        raise ValueError("a result needs a name and a unit")
    if not math.isfinite(value) or (ratio is not None and not math.isfinite(ratio)):
        raise ValueError(
            f"{name}: value {value} and ratio {ratio} must be finite; a failed run is not a result"
        )
    if (comparator is None) != (ratio is None):
        raise ValueError(f"{name}: comparator {comparator!r} and ratio {ratio} come together or not at all")
    line = {
        "name": name,
        "value": value,
        "unit": unit,
        "comparator": comparator,
        "ratio": ratio,
        "commit": commit(),
        "machine": machine(),
        "gpu": gpu(),
        "versions": versions(),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "details": details or {},
    }
    encoded = (json.dumps(line, ensure_ascii=False, allow_nan=False) + "\n").encode("utf-8")
    path.parent.mkdir(parents=True, exist_ok=True)
    # One write in append mode: benchmarks that run side by side never mix their lines.
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    try:
        os.write(descriptor, encoded)
    finally:
        os.close(descriptor)
    return line


def commit() -> str:
    """Commit of the checkout, with `+` when files differ from it; `$VPMOE_GIT_SHA` where there is no git.

    Raises:
        RuntimeError: Neither is there.
    """
    try:
        sha = _git("rev-parse", "HEAD")
        changed = _git(
            "status", "--porcelain", "--untracked-files=no", "--", ".", ":!benchmarks/results.jsonl"
        )
    except ProvenanceError:
        if given := os.environ.get("VPMOE_GIT_SHA"):
            return given
        raise RuntimeError(
            "no git checkout here, so the result's commit is unknown; set VPMOE_GIT_SHA "
            "to the commit that is measured"
        ) from None
    return f"{sha}+" if changed else sha


def machine() -> str:
    """Processor, number of usable cores and operating system, without names of hosts or people."""
    return f"{_processor()}, {len(os.sched_getaffinity(0))} cores, {platform.system()} {platform.machine()}"


def gpu() -> str | None:
    """Return number and name of the GPUs, or None."""
    try:
        import pynvml

        pynvml.nvmlInit()
    except Exception:
        return None  # no binding or no driver: no GPU that a benchmark could have used
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(index) for index in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    finally:
        pynvml.nvmlShutdown()
    counted = sorted({name: names.count(name) for name in names}.items())
    return ", ".join(f"{count} × {name}" for name, count in counted) or None


def versions() -> dict[str, str]:
    """Python and the packages that speed depends on; absent packages are left out."""
    found = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def _git(*arguments: str) -> str:
    return git(ROOT, *arguments).decode().strip()


def _processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or "unknown processor"


def main() -> None:
    """Append a result measured elsewhere, on the machine that measured it."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name")
    parser.add_argument("value", type=float)
    parser.add_argument("unit")
    parser.add_argument("--comparator")
    parser.add_argument("--ratio", type=float)
    given = parser.parse_args()
    print(
        json.dumps(
            record(given.name, given.value, given.unit, comparator=given.comparator, ratio=given.ratio)
        )
    )


if __name__ == "__main__":
    main()
