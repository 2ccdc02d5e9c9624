"""The training loop on one GPU against itself on a CPU: losses within tolerance, exact resume after a kill.

Everything is made again from seeds, so nothing but the code travels to the GPU machine. Four runs of one
small job, each a process of its own, as `python -m trainer train`:

1. CPU, fp32: the reference.
2. GPU, fp32: losses within `FP32_TOLERANCE` of the reference (relative).
3. GPU, bf16 under NCCL: losses within `BF16_TOLERANCE`.
4. GPU, bf16, killed with SIGKILL in the middle and started again: published bytes equal to those of run 3.

Runs 2 and 3 also repeat their last two steps from their own checkpoint (`resume_drift`). Prints one JSON
object; exit code 1 when anything is out of bounds.

    python -m benchmarks.gpu_smoke                 # on a GPU machine
    python -m benchmarks.gpu_smoke --device cpu    # the same four runs without a GPU, to test the script

Needs beside torch: megatron-core, numpy, packaging, pydantic (with pydantic-core, annotated-types,
typing-inspection), safetensors, tqdm.
"""

import argparse
import copy
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from benchmarks.job_file import write_job
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment

ROOT = Path(__file__).resolve().parents[1]
FP32_TOLERANCE = 1e-3
BF16_TOLERANCE = 5e-3
STEPS = 8
KILL_AFTER = 5
SEQ_LEN = 512
EOD = 199999


def write_data(root: Path, vocab: int) -> None:
    """Mock conversations in the `synth_kd_v1` layout; each token follows from the one before."""
    rng = np.random.default_rng(0)
    splits = {}
    for split, rows in (("train", 200), ("valid", 40)):
        prefix = root / split / "shard_00"
        prefix.parent.mkdir(parents=True)
        kinds = {"tokens": np.int32, "lossmask": np.uint8, "span": np.uint8}
        builders = {
            kind: IndexedDatasetBuilder(f"{prefix}_{kind}.bin", dtype=dtype) for kind, dtype in kinds.items()
        }
        total = 0
        for _ in range(rows):
            prompt, reasoning, final = (int(n) for n in rng.integers([20, 60, 20], [40, 200, 100]))
            length = prompt + reasoning + final + 1
            tokens = (int(rng.integers(0, 997)) + 3 * np.arange(length)) % 997
            tokens[-1] = EOD
            span = np.repeat([0, 1, 2, 0], [prompt - 1, reasoning, final, 2]).astype(np.uint8)
            arrays = {
                "tokens": tokens.astype(np.int32),
                "lossmask": (span > 0).astype(np.uint8),
                "span": span,
            }
            for kind, array in arrays.items():
                builders[kind].add_document(torch.from_numpy(array), [length])
            total += length
        for kind, builder in builders.items():
            builder.finalize(f"{prefix}_{kind}.idx")
        shard = {"name": "shard_00", "rows": rows, "tokens": total}
        splits[split] = {"rows": rows, "tokens": total, "shards": [shard]}
    manifest = {
        "schema_version": "synth_kd_v1",
        "tokenizer": {"type": "mock", "model_path": "none", "model_sha256": "0" * 64, "vocab_size": vocab},
        "config": {"loss_mask_alignment": "labels_shifted_with_pad", "eod_token_id": EOD},
        "splits": splits,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))


def recipe(dtype: str) -> dict[str, Any]:
    """Return the smoke experiment's stage 1 from a seeded init, shorter and in the given type."""
    found = copy.deepcopy(plain(load_experiment("smoke").train_recipe("vpmoe_stage1")))
    found |= {"steps": STEPS, "seq_len": SEQ_LEN, "init": "fresh"}
    found["training"] |= {"dtype": dtype, "save_interval": 2, "eval_interval": STEPS, "global_batch_size": 4}
    return found


def make_job(base: Path, name: str, data: Path, *, device: str, dtype: str) -> Path:
    """Write one run's job file and return its path."""
    return write_job(
        base / name,
        command="train",
        asset="gpu_smoke",
        experiment="smoke",
        recipe=recipe(dtype),
        seed=1234,
        inputs={"synth_kd_v1": data},
        execution={"device": device},
    )


def start(job: Path) -> subprocess.Popen[bytes]:
    """Start a run in a process of its own."""
    command = [sys.executable, "-m", "trainer", "train", "--job", str(job)]
    return subprocess.Popen(command, cwd=ROOT, env=os.environ | {"TORCHDYNAMO_DISABLE": "1"})


def finish(job: Path) -> dict[str, Any]:
    """Run a job to its end.

    Raises:
        RuntimeError: It failed.
    """
    code = start(job).wait()
    if code:
        raise RuntimeError(f"{job.parent.name} ended with {code}: {(job.parent / 'work/STATUS').read_text()}")
    found: dict[str, Any] = json.loads((job.parent / "out/summary.json").read_text())
    return found


def rows(job: Path) -> list[dict[str, Any]]:
    """Return the complete lines a run has logged so far."""
    path = job.parent / "work/metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def kill_in_the_middle(job: Path) -> None:
    """Start a run and send SIGKILL once it has logged step `KILL_AFTER`."""
    process = start(job)
    while not any(row["step"] >= KILL_AFTER for row in rows(job)):
        if process.poll() is not None:
            raise RuntimeError(f"ended with {process.returncode} before it could be killed")
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()


def payload(job: Path) -> dict[str, bytes]:
    """Every published file of a run."""
    return {path.name: path.read_bytes() for path in sorted((job.parent / "out/payload").iterdir())}


def deviation(job: Path, reference: Path) -> float:
    """Largest relative difference of the training losses of two runs."""
    pairs = zip(rows(job)[1:], rows(reference)[1:], strict=True)
    return max(abs(ours["loss"] - theirs["loss"]) / theirs["loss"] for ours, theirs in pairs)


def measure(base: Path, device: str) -> dict[str, Any]:
    """Run the four jobs and judge them."""
    data = base / "data"
    write_data(data, load_experiment("smoke").architecture("vpmoe").vocab_size)
    jobs = {
        name: make_job(base, name, data, device=where, dtype=dtype)
        for name, where, dtype in (
            ("cpu_fp32", "cpu", "fp32"),
            ("gpu_fp32", device, "fp32"),
            ("gpu_bf16", device, "bf16"),
            ("gpu_bf16_killed", device, "bf16"),
        )
    }
    summaries = {name: finish(jobs[name]) for name in ("cpu_fp32", "gpu_fp32", "gpu_bf16")}
    kill_in_the_middle(jobs["gpu_bf16_killed"])
    summaries["gpu_bf16_killed"] = finish(jobs["gpu_bf16_killed"])
    fp32 = deviation(jobs["gpu_fp32"], jobs["cpu_fp32"])
    bf16 = deviation(jobs["gpu_bf16"], jobs["cpu_fp32"])
    resumed = summaries["gpu_bf16_killed"]["resumed_from"]
    checks = {
        "fp32_agrees": fp32 <= FP32_TOLERANCE,
        "bf16_agrees": bf16 <= BF16_TOLERANCE,
        "killed_run_resumed": resumed is not None and 0 < resumed < STEPS,
        "killed_run_equals_straight_run": payload(jobs["gpu_bf16_killed"]) == payload(jobs["gpu_bf16"]),
        "resume_drift_is_0": all(found["resume_drift"] == 0.0 for found in summaries.values()),
        "learns": all(
            found["heldout_loss_end"] < found["heldout_loss_start"] for found in summaries.values()
        ),
    }
    return {
        "name": "gpu_smoke",
        "device": device,
        "gpu": torch.cuda.get_device_name(0) if device == "cuda" else None,
        "versions": {
            "python": platform.python_version(),
            "torch": version("torch"),
            "megatron-core": version("megatron-core"),
        },
        "steps": STEPS,
        "parameters": summaries["cpu_fp32"]["parameters"],
        "losses": {name: [round(row["loss"], 5) for row in rows(job)[1:]] for name, job in jobs.items()},
        "step_ms": {
            name: round(float(np.median([row["step_ms"] for row in rows(job)[2:]])), 1)
            for name, job in jobs.items()
        },
        "fp32_largest_relative_difference": fp32,
        "fp32_tolerance": FP32_TOLERANCE,
        "bf16_largest_relative_difference": bf16,
        "bf16_tolerance": BF16_TOLERANCE,
        "resumed_from": resumed,
        "resume_drift": {name: found["resume_drift"] for name, found in summaries.items()},
        "checks": checks,
        "passed": all(checks.values()),
    }


def main() -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="device of runs 2 to 4")
    parser.add_argument("--keep", type=Path, help="keep the runs in this empty directory")
    options = parser.parse_args()
    if options.keep is not None:
        options.keep.mkdir(parents=True, exist_ok=True)
        report = measure(options.keep.resolve(), options.device)
    else:
        with tempfile.TemporaryDirectory() as scratch:
            report = measure(Path(scratch), options.device)
    print(json.dumps(report, indent=1))
    return 0 if report["passed"] else 1


if __name__ == "__main__":
    sys.exit(main())
