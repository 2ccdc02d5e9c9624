"""A large store of made-up artifacts, for measuring what looks at one: records, ledger, statements, files.

    python -m benchmarks.synthetic_store DIRECTORY [--records 10000] [--files 1000000] [--no-payload]

Every record is one that the store's own reader accepts: its digests are those of its files, and its inputs
name records that are there. Nothing is flushed to disk, for nobody keeps it. Experiments `exp_00`, `exp_01`
and so on have a ladder of ten assets in as many versions as it takes; `exp_00/chain` is a chain of 200
versions, each made from the one before.
"""

import argparse
import hashlib
import json
import os
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from trainer.contract.canonical import canonical_json, sha256_json
from vpmoe_assets.lineage.digest import FileEntry, merkle_root
from vpmoe_assets.lineage.ledger import Ledger
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, SCHEMA
from vpmoe_assets.lineage.statements import DIRECTORY as STATEMENTS

EXPERIMENTS = 20
CHAIN = 200
STEPS = 100
"""Of a training curve."""
LADDER: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("synth", ()),
    ("synth_harmony", ("synth",)),
    ("synth_kd_v1", ("synth_harmony",)),
    ("qwen3_0_6b", ()),
    ("vpdense_28", ("qwen3_0_6b",)),
    ("vpdense_28_healed", ("vpdense_28", "synth_kd_v1")),
    ("vpmoe", ("vpdense_28_healed",)),
    ("vpmoe_stage1", ("vpmoe", "synth_kd_v1")),
    ("eval_vpmoe_stage1", ("vpmoe_stage1",)),
    ("perf_profile", ()),
)
"""Assets of an experiment, each with those it is made from."""
DATA = frozenset({"synth_harmony", "synth_kd_v1"})
TRAINED = frozenset({"vpdense_28_healed", "vpmoe_stage1"})
_BEGUN = datetime(2026, 1, 1, tzinfo=UTC)
_TASKS = ("arc_easy", "boolq", "hellaswag", "piqa", "mean")


@dataclass(frozen=True)
class _Plan:
    root: Path
    experiment: int
    records: int
    files: int
    payload: bool


@dataclass(frozen=True)
class _Made:
    asset: str
    version: str
    digest: str
    record_digest: str


def write_store(
    root: Path, records: int = 10_000, files: int = 1_000_000, *, payload: bool = True, workers: int = 2
) -> int:
    """Write a store.

    Args:
        root: An empty directory, or none.
        records: How many; at least 400.
        files: In all payloads together, spread evenly.
        payload: Whether the payload's files are written, too; else only the records name them.
        workers: Processes.

    Returns:
        How many records were written.
    """
    experiments = min(EXPERIMENTS, max(1, records // 400))
    per_record = max(1, files // records)
    plans = [
        _Plan(root, number, records // experiments, per_record, payload) for number in range(experiments)
    ]
    if workers == 1:
        return sum(map(_write_experiment, plans))
    with ProcessPoolExecutor(workers) as pool:
        return sum(pool.map(_write_experiment, plans))


def _write_experiment(plan: _Plan) -> int:
    chance = random.Random(plan.experiment)
    written = 0
    latest: dict[str, _Made] = {}
    sequences: Counter[str] = Counter()
    for asset, parents in _schedule(plan):
        sequences[asset] += 1
        inputs = [latest[parent] for parent in parents if parent in latest]
        latest[asset] = _write(plan, chance, asset, sequences[asset], inputs, written)
        written += 1
    return written


def _schedule(plan: _Plan) -> Iterator[tuple[str, tuple[str, ...]]]:
    left = plan.records
    if plan.experiment == 0:
        left -= CHAIN
        yield from (("chain", ("chain",)) for _ in range(CHAIN))
    while left > 0:
        yield from LADDER[:left]
        left -= len(LADDER)


def _write(
    plan: _Plan, chance: random.Random, asset: str, sequence: int, inputs: Sequence[_Made], number: int
) -> _Made:
    experiment = f"exp_{plan.experiment:02d}"
    contents = {
        f"part_{n:04d}.bin": f"{experiment} {asset} {sequence} {n}\n".encode() for n in range(plan.files)
    }
    entries = [
        FileEntry(path, len(data), hashlib.sha256(data).hexdigest()) for path, data in contents.items()
    ]
    digest = merkle_root(entries)
    published = _BEGUN + timedelta(minutes=37 * number + plan.experiment)
    version = f"{published:%Y%m%d}.{number + 1}-{digest[:8]}"
    directory = plan.root / experiment / asset / version
    (directory / ("payload" if plan.payload else "run")).mkdir(parents=True)
    if plan.payload:
        _write_files(directory / "payload", contents)
    run: dict[str, bytes] = {}
    if asset in TRAINED:
        run["metrics.jsonl"] = _curve(chance)
        (directory / "run").mkdir(exist_ok=True)
        _write_files(directory / "run", run)
    manifest = _manifest(entries) if asset in DATA else None
    if manifest is not None:
        _write_files(directory, {MANIFEST_NAME: manifest})
    fields = _fields(chance, asset, inputs, published) | {
        "schema": SCHEMA,
        "experiment": experiment,
        "asset": asset,
        "version": version,
        "sequence": sequence,
        "published_utc": published.isoformat(),
        "digest": digest,
        "files": [{"path": e.path, "size": e.size, "sha256": e.sha256} for e in entries],
        "run_files": [
            {"path": path, "size": len(data), "sha256": hashlib.sha256(data).hexdigest()}
            for path, data in run.items()
        ],
        "manifest": manifest
        and {
            "size": len(manifest),
            "sha256": hashlib.sha256(manifest).hexdigest(),
            "content_sha256": sha256_json(json.loads(manifest)),
        },
    }
    fields["fingerprint"] = sha256_json(fields["fingerprint_payload"])
    made = _Made(asset, version, digest, sha256_json(fields))
    _write_record(plan.root, fields, made, directory)
    _write_verdict(plan.root, experiment, made, published)
    return made


def _fields(
    chance: random.Random, asset: str, inputs: Sequence[_Made], published: datetime
) -> dict[str, Any]:
    """Return what the maker of an artifact states."""
    packages = {f"package_{n}": f"1.{n}.0" for n in range(12)} | {"torch": "2.11.0"}
    rate = chance.choice((1e-3, 3e-4, 1e-4))
    metrics: dict[str, Any] = {"rows": chance.randrange(1000, 9000)} if asset in DATA else {}
    if asset.startswith(("vp", "qwen")):
        metrics = {"parameters": 1_000_000 + len(asset), "num_layers": 28, "hidden_size": 64}
    if asset in TRAINED:
        metrics |= {"loss": chance.uniform(1, 3), "valid_loss": chance.uniform(1, 3), "train_seconds": 60.0}
    return {
        "fingerprint_payload": {
            "schema": "vpmoe.fingerprint/2",
            "recipe": {
                "asset": asset,
                "training": {"lr": rate, "steps": STEPS, "seed": chance.randrange(99)},
            },
            "sources": {f"trainer/part_{n}.py": f"{n:064x}" for n in range(20)},
            "packages": {"safetensors": "0.8.0"},
            "inputs": {each.asset: each.digest for each in inputs},
        },
        "inputs": [
            {
                "asset": each.asset,
                "version": each.version,
                "digest": each.digest,
                "record_digest": each.record_digest,
                "role": each.asset,
                "acceptance": None,
            }
            for each in inputs
        ],
        "execution": {"device": "cpu", "dp": 1},
        "seed": 1234,
        "code": {"git_sha": "a" * 40, "git_dirty": False, "patch_digest": None, "source_digest": "b" * 64},
        "environment": {"python": "3.12.1", "host": "here", "packages": packages},
        "command": ["dagster", "asset", "materialize"],
        "started_utc": (published - timedelta(minutes=chance.randrange(1, 30))).isoformat(),
        "finished_utc": published.isoformat(),
        "metrics": metrics,
        "evals": _scores(chance, inputs[0]) if asset.startswith("eval_") else [],
        "perf": _figures(chance) if asset == "perf_profile" else [],
        "details": {},
        "dagster_run_id": f"{chance.getrandbits(128):032x}",
        "objects": dict.fromkeys(
            ("sources", "experiment", "resolved_experiment", "run_config", "packages", "patch")
        ),
        "blocking_checks": ["aligned"],
        "original": None,
        "attempts": [],
    }


def _scores(chance: random.Random, judged: _Made) -> list[dict[str, Any]]:
    return [
        {
            "object_asset": judged.asset,
            "object_version": judged.version,
            "suite": "core8",
            "task": task,
            "score": chance.random(),
            "centered": None,
            "correct": None,
            "total": None,
            "stderr": None,
        }
        for task in _TASKS
    ]


def _figures(chance: random.Random) -> list[dict[str, Any]]:
    return [
        {"name": name, "value": chance.uniform(0.1, 9), "unit": unit, "device": "cpu", "context": {}}
        for name, unit in (("step_ms", "ms"), ("tokens_per_s", "tokens/s"), ("peak_gib", "GiB"))
    ]


def _curve(chance: random.Random) -> bytes:
    lines = ({"step": step, "loss": 3 / step + chance.random(), "lr": 1e-3} for step in range(1, STEPS + 1))
    return "".join(json.dumps(line) + "\n" for line in lines).encode()


def _manifest(entries: Sequence[FileEntry]) -> bytes:
    shards = [
        {"path": e.path, "bytes": e.size, "rows": 100, "row_groups": 1, "sha256": e.sha256} for e in entries
    ]
    return json.dumps({"storage": {"shards": shards}}).encode()


def _write_record(root: Path, fields: dict[str, Any], made: _Made, directory: Path) -> None:
    written = fields | {"record_digest": made.record_digest}
    _write_files(directory, {RECORD_NAME: json.dumps(written, sort_keys=True).encode()})
    ledger = Ledger(root)
    copy = ledger.path(made.record_digest)
    copy.parent.mkdir(parents=True, exist_ok=True)
    os.link(directory / RECORD_NAME, copy)
    if fields["manifest"] is not None:
        kept = ledger.manifest(fields["manifest"]["sha256"])
        kept.parent.mkdir(parents=True, exist_ok=True)
        if not kept.exists():
            os.link(directory / MANIFEST_NAME, kept)
    line = f"\n{made.record_digest} {fields['experiment']} {made.asset} {made.version}\n"
    known = ledger.root / "by-fingerprint" / fields["fingerprint"][:2]
    known.mkdir(parents=True, exist_ok=True)
    with (known / fields["fingerprint"]).open("a", encoding="ascii") as file:
        file.write(line)


def _write_verdict(root: Path, experiment: str, made: _Made, published: datetime) -> None:
    statement = {
        "schema": "vpmoe.statement/1",
        "kind": "verdict",
        "record": made.record_digest,
        "artifact": f"{experiment}/{made.asset}/{made.version}",
        "time": published.isoformat(),
        "author": "vpmoe",
        "reason": "",
        "body": {
            "check": "aligned",
            "version": "1" * 64,
            "outcome": "passed",
            "blocking": True,
            "severity": "ERROR",
            "description": "",
            "metadata": {},
        },
        "previous": None,
    }
    directory = root / STATEMENTS / experiment / made.asset
    directory.mkdir(parents=True, exist_ok=True)
    line = canonical_json(statement | {"id": sha256_json(statement)}) + "\n"
    (directory / f"{made.record_digest}.jsonl").write_text(line, encoding="ascii")


def _write_files(directory: Path, contents: dict[str, bytes]) -> None:
    at = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for name, data in contents.items():
            descriptor = os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444, dir_fd=at)
            os.write(descriptor, data)
            os.close(descriptor)
    finally:
        os.close(at)


def command_line(description: str | None) -> argparse.Namespace:
    """Read the command line of a benchmark of such a store: `store`, `records`, `files`, `record`."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--store", type=Path, help="one that benchmarks.synthetic_store wrote")
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    return parser.parse_args()


def main() -> None:
    """Write a store where the command line says."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("directory", type=Path)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--files", type=int, default=1_000_000)
    parser.add_argument(
        "--no-payload", action="store_true", help="write records, but not the files they name"
    )
    given = parser.parse_args()
    count = write_store(given.directory, given.records, given.files, payload=not given.no_payload)
    print(f"{count} records in {given.directory}")


if __name__ == "__main__":
    main()
