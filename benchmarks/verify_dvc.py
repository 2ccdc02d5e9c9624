"""Is nothing changed? `vpmoe verify` beside `dvc status`, on the same files, none of which was.

    python -m venv DVC && DVC/bin/pip install -r benchmarks/verify_dvc.txt
    python -m benchmarks.verify_dvc DVC [--files 1000000] [--records 10000] [--directory DIR | --keep DIR]
        [--record]

Both have looked at everything before, and remember it; each command is timed whole, in turn, with the start
of its process. Both see the same files: DVC's have a second name. Making them takes much longer than looking,
the most of it in `dvc add`.
"""

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

from benchmarks import synthetic_store
from benchmarks.record import record as append
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

REPEATS = 3
_SETTLING_S = 3.0
"""Files that were written to a moment ago are not remembered."""


def main() -> None:
    """Measure, print, and with `--record` remember."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("environment", type=Path, help="virtual environment with DVC")
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--directory", type=Path, help="where the files are made, and removed")
    parser.add_argument(
        "--keep",
        type=Path,
        metavar="DIR",
        help="leave the files in DIR; found there, they are not made again",
    )
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    given = parser.parse_args()
    dvc = given.environment.absolute() / "bin" / "dvc"
    with nullcontext(given.keep) if given.keep else tempfile.TemporaryDirectory(dir=given.directory) as place:
        root = Path(place).absolute()
        made = root / "made.json"
        if not made.exists():
            made.write_text(json.dumps({"files": _prepare(root, dvc, given.records, given.files)}))
        files = json.loads(made.read_text())["files"]
        took = _times(root, dvc)
    ours, theirs = (statistics.median(took[name]) for name in ("vpmoe", "dvc"))
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    print(f"{files} files unchanged: verify {ours:.2f} s, dvc status {theirs:.2f} s: {theirs / ours:.1f} x")
    if given.record:
        append(
            f"verify.unchanged.{given.files}",
            files / ours,
            "files/s",
            comparator="dvc status",
            ratio=theirs / ours,
            details={"files": files, "verify_s": took["vpmoe"], "dvc_s": took["dvc"], "peak_mb": peak},
        )


def _prepare(root: Path, dvc: Path, records: int, files: int) -> int:
    """Make a store, have DVC track its files and let both look at them; returns how many there are."""
    synthetic_store.EXPERIMENTS = 1
    root.mkdir(parents=True, exist_ok=True)
    store = Store(root / "artifacts")
    synthetic_store.write_store(store.root, records, files)
    Index(store.root / "index.duckdb").rebuild(store)
    work = root / "dvc"
    work.mkdir()
    shutil.copytree(store.root / "exp_00", work / "data", copy_function=os.link)
    for arguments in (
        ["init", "-q", "--no-scm"],
        ["config", "cache.type", "hardlink"],
        ["add", "-q", "data"],
    ):
        subprocess.run([dvc, *arguments], cwd=work, check=True, env=_environment(root))
    time.sleep(_SETTLING_S)
    _times(root, dvc, 1)
    return sum(len(names) for _, _, names in os.walk(store.root / "exp_00"))


def _times(root: Path, dvc: Path, repeats: int = REPEATS) -> dict[str, list[float]]:
    """Return the seconds of each command, in turn, and require that both find nothing changed."""
    verify = [sys.executable, "-m", "vpmoe_assets.cli", "verify", "-e", "exp_00"]
    commands: dict[str, tuple[list[str], Path, str]] = {
        "vpmoe": (verify, ROOT, "all intact"),
        "dvc": ([str(dvc), "status"], root / "dvc", "up to date"),
    }
    took: dict[str, list[float]] = {name: [] for name in commands}
    for _ in range(repeats):
        for name, (command, directory, answer) in commands.items():
            began = time.monotonic()
            done = subprocess.run(
                command, cwd=directory, env=_environment(root), capture_output=True, text=True, check=False
            )
            took[name].append(time.monotonic() - began)
            if answer not in done.stdout:
                raise SystemExit(
                    f"{name} did not find everything unchanged: {done.stdout[-300:]}{done.stderr[-300:]}"
                )
    return took


def _environment(root: Path) -> dict[str, str]:
    return {**os.environ, "VPMOE_ARTIFACTS": str(root / "artifacts"), "DVC_NO_ANALYTICS": "1"}


if __name__ == "__main__":
    main()
