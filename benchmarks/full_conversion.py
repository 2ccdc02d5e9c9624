"""The last two rungs at full size, from random weights in bf16: vpMoE (1.4 GB in, 12 GB out) or vpDense_80.

    python -m benchmarks.full_conversion [--rung vpmoe] [--directory DIR] [--experiment full] [--record]

Runs `python -m trainer convert` in a process of its own, read-back and function check included, and reports
its wall time and the peak of its resident memory, page cache not counted. One line of JSON. Everything made
is deleted again.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.job_file import write_job
from benchmarks.record import ROOT, record
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.rungs.expand import ExpandRecipe
from trainer.contract.schema.rungs.upcycle import UpcycleRecipe
from trainer.surgery.tensors import tensor_table
from trainer.surgery.weights import WeightsWriter

RUNGS = ("vpmoe", "vpdense_80")
SPARE_BYTES = 2 * 2**30
"""Disk that stays free."""


def write_parent(recipe: ExpandRecipe | UpcycleRecipe, directory: Path, seed: int = 1) -> int:
    """Random weights of the parent's geometry; returns their bytes."""
    generator = torch.Generator().manual_seed(seed)
    with WeightsWriter(directory, recipe.parent, recipe.parent_dtype) as out:
        for name, spec in out.specs.items():
            value = torch.empty(spec.shape).normal_(0.0, 0.02, generator=generator)
            out.write(name, value + 1.0 if name.endswith("layernorm.weight") else value)
        out.finish()
    return sum(spec.nbytes for spec in out.specs.values())


def measure(experiment: str, rung: str, base: Path) -> dict[str, Any]:
    """Convert once.

    Raises:
        RuntimeError: The disk has no room, the conversion failed, or one of its checks did.
    """
    recipe = load_experiment(experiment).convert_recipe(rung)
    assert isinstance(recipe, ExpandRecipe | UpcycleRecipe)
    sizes = [
        sum(spec.nbytes for spec in tensor_table(architecture, dtype).values())
        for architecture, dtype in ((recipe.parent, recipe.parent_dtype), (recipe.architecture, recipe.dtype))
    ]
    free = shutil.disk_usage(base).free
    if free < sum(sizes) + SPARE_BYTES:
        raise RuntimeError(
            f"{base} has {free / 1e9:.1f} GB free, {(sum(sizes) + SPARE_BYTES) / 1e9:.1f} GB needed; "
            "give another --directory"
        )
    write_parent(recipe, base / "parent")
    job = write_job(
        base,
        command="convert",
        asset=rung,
        experiment="full",
        recipe=plain(recipe),
        seed=1234,
        inputs={recipe.source: base / "parent"},
        execution={"device": "cpu"},
    )
    done = subprocess.run(
        [sys.executable, "-m", "trainer", "convert", "--job", str(job)],
        cwd=ROOT,
        env=os.environ | {"TORCHDYNAMO_DISABLE": "1"},
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"the conversion ended with exit code {done.returncode}")
    summary = json.loads((base / "out" / "summary.json").read_text(encoding="utf-8"))
    checks = {name: check["passed"] for name, check in summary["checks"].items()}
    if not checks["logits_bit_identical"]:
        raise RuntimeError(f"the converted model is another function: {summary['checks']}")
    result = {
        "wall_seconds": summary["wall_seconds"],
        "peak_rss_bytes": summary["peak_rss_bytes"],
        "bytes_in": sizes[0],
        "bytes_out": sizes[1],
        "parameters": summary["parameters"],
        "checks": checks,
        "threads": torch.get_num_threads(),
    }
    if "router_entropy" in checks:
        result["router_entropy"] = summary["checks"]["router_entropy"]["metadata"]
    return result


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rung", default="vpmoe", choices=RUNGS, help="what is made (default: vpmoe)")
    parser.add_argument("--directory", type=Path, help="where to write (default: a temporary directory)")
    parser.add_argument("--experiment", default="full", help="experiment whose rung is made (default: full)")
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="full_conversion_") as directory:
        result = measure(options.experiment, options.rung, Path(directory))
    print(json.dumps(result))
    if options.record:
        suffix = "" if options.rung == "vpmoe" else f"_{options.rung}"
        for name, key, unit, scale in (
            ("full_conversion_peak_memory", "peak_rss_bytes", "GB", 1e9),
            ("full_conversion_time", "wall_seconds", "s", 1.0),
        ):
            record(f"{name}_{options.experiment}{suffix}", result[key] / scale, unit, details=result)


if __name__ == "__main__":
    main()
