"""What lineage costs: publishing into a small and a large store, looking up, a run in which nothing is due.

    python -m benchmarks.lineage [--record]          publishing and looking up, in stores made for it
    python -m benchmarks.lineage --run [--record]    also `--select '*'` of the experiment in force, once made

Comparators: a store of ten artifacts; reading the records; and as many assets and checks that do nothing, in
an instance of their own. A run is measured in seconds of CPU, since the disk's part varies with whoever else
uses it.
"""

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.record import record as append
from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.digest import merkle_root, scan_tree
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import RECORD_NAME, CodeState, Draft, Record, read_record, record_bytes
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

SMALL, LARGE = 10, 1000
REPEATS = 9
ASSETS, FILES = 40, 1000


def main() -> None:
    """Measure, print, and with `--record` remember."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--run", action="store_true", help="measure a run of the experiment in force, too")
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    given = parser.parse_args()
    results = [_publishing(), _looking_up(), *([_nothing_due()] if given.run else [])]
    for result in results:
        value = f"{result['value']:.4g} {result['unit']}"
        print(f"{result['name']}: {value}, {result['ratio']:.3g} x {result['comparator']}")
        if given.record:
            append(**result)


def _publishing() -> dict[str, Any]:
    seconds: dict[int, list[float]] = {SMALL: [], LARGE: []}
    with tempfile.TemporaryDirectory() as directory:
        stores = {size: _filled(Path(directory) / str(size), size) for size in seconds}
        for number in range(REPEATS):  # in turn, so that whatever else the machine does meets both
            for size, (store, index) in stores.items():
                seconds[size].append(_published_s(store, index, number))
    small, large = (statistics.median(seconds[size]) for size in (SMALL, LARGE))
    return {
        "name": "lineage_publish",
        "value": large,
        "unit": "s",
        "comparator": f"publishing into a store of {SMALL} artifacts instead of {LARGE}",
        "ratio": small / large,
        "details": {"artifacts": LARGE, "repeats": REPEATS},
    }


def _filled(root: Path, size: int) -> tuple[Store, Index]:
    """Return a store of so many artifacts, and its index."""
    store = Store(root)
    for number in range(size):
        _put(store, f"asset_{number}")
    index = Index(root / "index.duckdb")
    index.rebuild(store)
    return store, index


def _published_s(store: Store, index: Index, number: int) -> float:
    payload = {"recipe": {"number": number}, "inputs": {}}
    began = time.perf_counter()
    with store.work_area("bench", "new", sha256_json(payload)) as work:
        (work.payload / "data.bin").write_bytes(bytes([number]) * 4096)
        store.publish(work, _draft(payload))
    if (missed := index.update(store)) is not None:
        raise RuntimeError(missed)
    return time.perf_counter() - began


def _looking_up() -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        assets = [f"asset_{number}" for number in range(ASSETS)]
        paths = [_put(Store(root), asset, FILES) for asset in assets]
        time.sleep(2.1)  # what was written a moment ago is not remembered

        def latest() -> None:
            store = Store(root)
            for asset in assets:
                store.latest("bench", asset)

        def read() -> None:
            for path in paths:
                read_record(path)

        latest()
        looked_up, parsed = _median_s(latest), _median_s(read)
    return {
        "name": "lineage_latest",
        "value": looked_up,
        "unit": "s",
        "comparator": "reading the records",
        "ratio": parsed / looked_up,
        "details": {"assets": ASSETS, "files": FILES},
    }


def _nothing_due() -> dict[str, Any]:
    """Measure `--select '*'` where everything was made before, in the instance and store in force."""
    from vpmoe_assets.definitions import steps

    checks = sum(len(step.checks) for step in steps.values()) + 2
    run = _cpu_s("vpmoe_assets.definitions", os.environ)
    with tempfile.TemporaryDirectory() as home:
        shutil.copy(ROOT / "dagster.yaml", home)
        counts = {"BARE_ASSETS": str(len(steps) + 1), "BARE_CHECKS": str(checks)}
        bare = _cpu_s("benchmarks.bare_graph", {**os.environ, **counts, "DAGSTER_HOME": home}, Path(home))
    return {
        "name": "lineage_nothing_due",
        "value": run[0],
        "unit": "s of CPU",
        "comparator": "as many assets and checks that do nothing",
        "ratio": bare[0] / run[0],
        "details": {"wall_s": run[1], "bare_wall_s": bare[1], "assets": len(steps) + 1, "checks": checks},
    }


def _cpu_s(module: str, environment: Any, place: Path = ROOT) -> tuple[float, float]:
    """Return CPU and wall-clock seconds of a second run of everything in a code location."""
    command = [sys.executable, "-m", "dagster", "asset", "materialize", "-m", module, "--select", "*"]
    settings = {**environment, "PYTHONPATH": str(ROOT), "DAGSTER_DISABLE_TELEMETRY": "1"}
    for _ in range(2):
        before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        subprocess.run(command, cwd=place, env=settings, check=True, capture_output=True)
        after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter() - began
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return cpu, wall


def _median_s(work: Callable[[], None]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return statistics.median(seconds)


def _put(store: Store, asset: str, files: int = 1) -> Path:
    """Put an artifact where a publication would, without its waits for the disk; return the record's path."""
    version = "20260131.1-00000000"
    directory = store.version_directory("bench", asset, version)
    (directory / "payload").mkdir(parents=True)
    for number in range(files):
        (directory / "payload" / f"part_{number:04d}.bin").write_bytes(f"{asset} {number}".encode())
    entries = scan_tree(directory / "payload")
    payload = {"recipe": {"asset": asset}, "inputs": {}}
    written = Record.model_validate(
        {
            **_draft(payload).model_dump(),
            "experiment": "bench",
            "asset": asset,
            "version": version,
            "sequence": 1,
            "published_utc": "2026-01-31T12:00:00+00:00",
            "fingerprint": sha256_json(payload),
            "digest": merkle_root(entries),
            "files": [asdict(entry) for entry in entries],
        }
    )
    path = directory / RECORD_NAME
    path.write_bytes(record_bytes(written))
    return path


def _draft(payload: dict[str, Any]) -> Draft:
    return Draft(
        fingerprint_payload=payload,
        code=CodeState(git_sha="0" * 40, git_dirty=False, patch_digest=None, source_digest="0" * 64),
        environment={"python": sys.version.split()[0]},
        command=tuple(sys.argv),
        started_utc="2026-01-31T11:00:00+00:00",
        finished_utc="2026-01-31T12:00:00+00:00",
    )


if __name__ == "__main__":
    main()
