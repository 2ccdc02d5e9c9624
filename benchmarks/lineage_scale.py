"""What 10,000 records and 1,000,000 files cost: the index made again, documented questions, lineage, `show`.

    python -m benchmarks.lineage_scale [--store DIRECTORY] [--records 10000] [--files 1000000] [--record]

The store is a synthetic one (`benchmarks.synthetic_store`), made for this unless one is named, without its
payloads. Comparators: reading and checking as many records in one process, for the index; the limits that the
others are held to.
"""

import re
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.record import record as append
from benchmarks.synthetic_store import CHAIN, command_line, write_store
from vpmoe_assets.lineage.graph import Graph, ancestors, descendants
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import RECORD_NAME, read_record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT

REPEATS = 3
WORKERS = 2
SAMPLE = 300
"""Records that are read one after another, for the comparator."""
QUESTION_S, REBUILD_S, LINEAGE_S = 0.2, 60.0, 1.0
"""What each may take."""


def main() -> None:
    """Measure, print, and with `--record` remember."""
    given = command_line(__doc__)
    with tempfile.TemporaryDirectory() as scratch:
        root = given.store or Path(scratch) / "artifacts"
        if given.store is None:
            write_store(root, given.records, given.files, payload=False)
        for result in (_rebuild(root), _questions(root), *_lineage(root), *_verbs(root)):
            print(
                f"{result['name']}: {result['value']:.4g} {result['unit']}, "
                f"{result['ratio']:.3g} x {result['comparator']}; {result['details']}"
            )
            if given.record:
                append(**result)


def _rebuild(root: Path) -> dict[str, Any]:
    index, store = Index(root / "index.duckdb"), Store(root)
    paths = [path for _, path in zip(range(SAMPLE), root.glob(f"exp_*/*/*/{RECORD_NAME}"), strict=False)]
    began = time.perf_counter()
    for path in paths:
        read_record(path)
    each = (time.perf_counter() - began) / len(paths)
    began = time.perf_counter()
    if left := index.rebuild(store, workers=WORKERS):
        raise RuntimeError(f"{len(left)} records are not in the index: {left[0].message}")
    took = time.perf_counter() - began
    records, files = (index.query(f"SELECT count(*) FROM {t}").rows[0][0] for t in ("artifacts", "files"))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return {
        "name": "lineage_rebuild",
        "value": took,
        "unit": "s",
        "comparator": "reading as many records in one process, from a sample",
        "ratio": each * records / took,
        "details": {
            "records": records,
            "files": files,
            "workers": WORKERS,
            "limit_s": REBUILD_S,
            "peak_mb": peak // 1000,
            "peak_mb_of_a_worker": children // 1000,
            "index_mb": index.path.stat().st_size // 10**6,
        },
    }


def _questions(root: Path) -> dict[str, Any]:
    """Ask every documented question, of the first experiment."""
    text = (ROOT / "docs" / "questions.md").read_text(encoding="utf-8")
    asked = [sql.replace("'smoke'", "'exp_00'") for sql in re.findall(r"```sql\n(.*?)```", text, re.DOTALL)]
    index = Index(root / "index.duckdb")
    took = {number: _best_s(partial(index.query, sql)) for number, sql in enumerate(asked, start=1)}
    slowest = max(took, key=took.__getitem__)
    return {
        "name": "lineage_questions",
        "value": took[slowest] * 1000,
        "unit": "ms",
        "comparator": f"the limit of {QUESTION_S * 1000:.0f} ms for the slowest of them",
        "ratio": QUESTION_S / took[slowest],
        "details": {"ms": {str(number): round(s * 1000, 1) for number, s in took.items()}},
    }


def _lineage(root: Path) -> list[dict[str, Any]]:
    """Walk the chain from its end up, and from its beginning down, in this process."""
    store = Store(root)
    heads = store.scan("exp_00", "chain")[0]
    found = []
    for name, walk, start in (("up", ancestors, heads[-1]), ("down", descendants, heads[0])):
        if len(walk(store, start).nodes) != CHAIN:
            raise RuntimeError(f"the chain of {CHAIN} was not found {name}wards")
        took = _best_s(partial(_walked, walk, root, start))
        found.append(
            {
                "name": f"lineage_chain_{name}",
                "value": took,
                "unit": "s",
                "comparator": f"the limit of {LINEAGE_S:.0f} s",
                "ratio": LINEAGE_S / took,
                "details": {"depth": CHAIN},
            }
        )
    return found


def _walked(walk: Callable[[Store, Head], Graph], root: Path, start: Head) -> Graph:
    return walk(Store(root), start)


def _verbs(root: Path) -> list[dict[str, Any]]:
    """Start the command itself."""
    found = []
    for name, arguments in (
        ("lineage", ["lineage", "chain", "-e", "exp_00", "--up"]),
        ("lineage_both", ["lineage", "vpmoe_stage1", "-e", "exp_00"]),
        ("show", ["show", "vpmoe_stage1", "-e", "exp_00"]),
    ):
        took = _best_s(partial(_vpmoe, root, arguments))
        found.append(
            {
                "name": f"lineage_verb_{name}",
                "value": took,
                "unit": "s",
                "comparator": f"the limit of {LINEAGE_S:.0f} s, the start of Python with it",
                "ratio": LINEAGE_S / took,
                "details": {"arguments": arguments},
            }
        )
    return found


def _vpmoe(root: Path, arguments: list[str]) -> None:
    program = [sys.executable, "-m", "vpmoe_assets.cli", *arguments]
    subprocess.run(
        program, cwd=ROOT, check=True, capture_output=True, env={"VPMOE_ARTIFACTS": str(root), "PATH": ""}
    )


def _best_s(work: Callable[[], object]) -> float:
    seconds = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - began)
    return min(seconds)


if __name__ == "__main__":
    main()
