"""How fast and how flat `vpmoe data build` is, in one process on one core.

    python -m benchmarks.data_build [--rows 6000] [--input FILES] [--repeats 7] [--record]

Three figures, each against a comparator of the same run:

* encoding: rows/s of a whole build (parquet in; shards, digests and manifest out) over rows/s of a bare
  `tiktoken.encode_ordinary` loop over the same texts. Both alternate; the best of each counts.
* building: rows/s over those of `harmony_builder`, which renders with openai-harmony twice.
* memory: peak resident memory of a process that builds four times as many rows, over that for the rows.

Without `--input` the rows are generated. Given rows are repeated, with ids of their own, up to `--rows`.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks import harmony_builder
from benchmarks.record import record
from vpmoe_assets.generated.generator import generate_rows
from vpmoe_assets.harmony.build import build_kd
from vpmoe_assets.harmony.conversation import TEXT_FIELDS
from vpmoe_assets.harmony.tokenizer import load_tiktoken, write_tokenizer

COLUMNS = ("synth_id", *TEXT_FIELDS)
VALID_FRACTION = 0.001
#: The slow comparator sees only so many rows.
SLOW_ROWS = 200


def make_input(path: Path, rows: int, given: Sequence[Path]) -> list[dict[str, str]]:
    """Write `rows` rows as parquet and return them."""
    if given:
        found = [row for file in given for row in pq.read_table(file, columns=list(COLUMNS)).to_pylist()]
    else:
        found = [{name: row[name] for name in COLUMNS} for row in generate_rows(1234, rows)]
    made = [{**found[index % len(found)], "synth_id": f"bench-{index}"} for index in range(rows)]
    pq.write_table(pa.Table.from_pylist(made), path, row_group_size=1000, compression="zstd")
    return made


def build(source: Path, output: Path, tokenizer_dir: Path) -> int:
    """One build in this process; the number of tokens written."""
    manifest = build_kd(
        [source],
        output,
        tokenizer_dir=tokenizer_dir,
        git_sha="benchmark",
        created_unix_s=0,
        valid_fraction=VALID_FRACTION,
    ).manifest
    return sum(split["tokens"] for split in manifest["splits"].values())


def seconds(function: Callable[[], Any]) -> tuple[float, float]:
    """Wall and CPU seconds of one call."""
    wall, cpu = time.perf_counter(), time.process_time()
    function()
    return time.perf_counter() - wall, time.process_time() - cpu


def speed(rows: list[dict[str, str]], source: Path, tokenizer_dir: Path, repeats: int) -> dict[str, Any]:
    """Best of `repeats` alternating runs of the build and the bare loop, and one of the slow builder."""
    texts = [row[name] for row in rows for name in TEXT_FIELDS]
    encode = load_tiktoken(tokenizer_dir).encode_ordinary

    def bare() -> None:
        for text in texts:
            encode(text)

    root = source.parent
    tokens = build(source, root / "warm", tokenizer_dir)  # also loads what is loaded once per process
    loops, builds, slow = [], [], []
    for attempt in range(repeats):
        loops.append(seconds(bare))
        builds.append(seconds(partial(build, source, root / f"kd{attempt}", tokenizer_dir)))
    slow_rows = rows[:SLOW_ROWS]
    slow_build = partial(harmony_builder.build, tokenizer_dir=tokenizer_dir, valid_fraction=VALID_FRACTION)
    slow_build(slow_rows[:1], root / "slow")
    for attempt in range(max(3, repeats // 2)):
        slow.append(seconds(partial(slow_build, slow_rows, root / f"slow{attempt}")))
    best = {name: min(values)[0] for name, values in (("bare", loops), ("build", builds), ("slow", slow))}
    cpu = {
        name: min(value[1] for value in values)
        for name, values in (("bare", loops), ("build", builds), ("slow", slow))
    }
    return {
        "rows": len(rows),
        "tokens": tokens,
        "build_rows_s": len(rows) / best["build"],
        "build_tokens_s": tokens / best["build"],
        "bare_rows_s": len(rows) / best["bare"],
        "slow_rows_s": len(slow_rows) / best["slow"],
        "ratio_bare": best["bare"] / best["build"],
        "ratio_bare_cpu": cpu["bare"] / cpu["build"],
        "ratio_slow": (len(rows) / best["build"]) / (len(slow_rows) / best["slow"]),
        "ratio_slow_cpu": (len(rows) / cpu["build"]) / (len(slow_rows) / cpu["slow"]),
    }


def peak_mib(source: Path, tokenizer_dir: Path) -> float:
    """Peak resident memory, in MiB, of a fresh process that builds `source`."""
    program = (
        "import sys; from pathlib import Path; from vpmoe_assets.harmony.build import build_kd\n"
        "source, output, tokenizer = (Path(argument) for argument in sys.argv[1:])\n"
        "build_kd([source], output, tokenizer_dir=tokenizer, git_sha='benchmark', created_unix_s=0)\n"
        "print(Path('/proc/self/status').read_text())"
    )
    output = source.with_name(f"{source.stem}-memory")
    command = [sys.executable, "-c", program, str(source), str(output), str(tokenizer_dir)]
    status = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    # Not getrusage: its maximum is inherited from this process.
    peak = next(line for line in status.splitlines() if line.startswith("VmHWM:"))
    return int(peak.split()[1]) / 1024


def measure(row_count: int, given: Sequence[Path], repeats: int) -> dict[str, Any]:
    """All three figures."""
    with tempfile.TemporaryDirectory() as directory:
        root = Path(directory)
        write_tokenizer(root / "tokenizer")
        rows = make_input(root / "one.parquet", row_count, given)
        figures = speed(rows, root / "one.parquet", root / "tokenizer", repeats)
        make_input(root / "four.parquet", 4 * row_count, given)
        figures["peak_mib"] = peak_mib(root / "one.parquet", root / "tokenizer")
        figures["peak_mib_4x"] = peak_mib(root / "four.parquet", root / "tokenizer")
    figures["input"] = "given rows, repeated" if given else "generated rows"
    return figures


def main() -> None:
    """Measure, print one JSON line, and append the results if asked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=6000)
    parser.add_argument("--input", nargs="*", type=Path, default=[], help="SYNTH-shaped parquet")
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    figures = measure(options.rows, options.input, options.repeats)
    print(json.dumps(figures))
    if options.record:
        kind = "given" if options.input else "generated"
        record(
            f"data_build/encode/{kind}",
            figures["build_rows_s"],
            "rows/s",
            comparator="bare tiktoken.encode_ordinary loop over the same texts, one core",
            ratio=figures["ratio_bare"],
            details=figures,
        )
        record(
            f"data_build/builder/{kind}",
            figures["build_rows_s"],
            "rows/s",
            comparator="openai-harmony whole and per message, IndexedDatasetBuilder, one core",
            ratio=figures["ratio_slow"],
            details=figures,
        )
        record(
            f"data_build/memory/{kind}",
            figures["peak_mib_4x"],
            "MiB",
            comparator="peak memory for a quarter of the rows",
            ratio=figures["peak_mib"] / figures["peak_mib_4x"],
            details=figures,
        )


if __name__ == "__main__":
    main()
