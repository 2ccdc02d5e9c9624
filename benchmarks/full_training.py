"""One real training run of the locked model to its very end: steps, weights, resume check, summary.

    python -m benchmarks.full_training [--steps 4] [--nproc 2] [--directory DIR] [--record]
    python -m benchmarks.full_training --experiment smoke --device cpu --nproc 1     # to test the script

The experiment's stage 1 from a seeded init over mock conversations, as `python -m trainer train` under
torchrun, one sequence a rank. Reports the time of every phase as the trainer's heartbeat tells it (to within
its five seconds), the steps, and the peaks of device and disk. One line of JSON; everything made is deleted.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_smoke import write_data
from benchmarks.job_file import write_job
from benchmarks.record import ROOT, record
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment

STAGE = "vpmoe_stage1"
LOOK_S = 0.5


def make_job(
    experiment: str,
    base: Path,
    *,
    steps: int,
    nproc: int,
    device: str,
    backend: str | None = None,
    layers: int | None = None,
) -> Path:
    """Write mock data and the job file of the run; return the job file's path."""
    loaded = load_experiment(experiment)
    recipe = plain(loaded.train_recipe(STAGE))
    recipe |= {"steps": steps, "init": "fresh"}
    recipe["training"] |= {"global_batch_size": nproc, "micro_batch_size": 1}
    if backend is not None:
        recipe["training"]["backend"] = backend
    if layers is not None:
        recipe["architecture"]["model"]["num_layers"] = layers
    data = base / "data"
    write_data(data, loaded.architecture("vpmoe").vocab_size)
    return write_job(
        base,
        command="train",
        asset=STAGE,
        experiment=loaded.name,
        recipe=recipe,
        seed=loaded.seed,
        inputs={"synth_kd_v1": data},
        execution={"device": device, "nproc": nproc, "dp": nproc},
    )


def command(job: Path, nproc: int) -> list[str]:
    """Return the command line of the run."""
    train = ["-m", "trainer", "train", "--job", str(job)]
    if nproc == 1:
        return [sys.executable, *train]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*run, *train]


class Phases:
    """Seconds spent in each phase of a run, from its heartbeat; and the most disk it held."""

    def __init__(self, base: Path) -> None:
        self.base, self.seconds, self.peak_disk_bytes = base, dict[str, float](), 0
        self._free = shutil.disk_usage(base).free
        self._last = time.monotonic()

    def look(self) -> None:
        """Add the time since the last look to the phase that the run is in now."""
        try:
            phase = str(json.loads((self.base / "work" / "heartbeat").read_text())["phase"])
        except (FileNotFoundError, ValueError, KeyError):
            phase = "launch"
        now = time.monotonic()
        self.seconds[phase] = self.seconds.get(phase, 0.0) + now - self._last
        self._last = now
        used = self._free - shutil.disk_usage(self.base).free
        self.peak_disk_bytes = max(self.peak_disk_bytes, used)


def measure(job: Path, base: Path, *, nproc: int) -> dict[str, Any]:
    """Train once, from the start to the summary.

    Raises:
        RuntimeError: The run ended otherwise than well, or its resumed steps differ from the continued ones.
    """
    phases = Phases(base)
    environment = dict(os.environ)
    began = time.monotonic()
    with subprocess.Popen(command(job, nproc), cwd=ROOT, env=environment) as process:
        while process.poll() is None:
            phases.look()
            time.sleep(LOOK_S)
    if process.returncode:
        status = (base / "work" / "STATUS").read_text(encoding="utf-8").strip()
        raise RuntimeError(f"the run ended with exit code {process.returncode}: {status}")
    summary = json.loads((base / "out" / "summary.json").read_text(encoding="utf-8"))
    if summary["resume_drift"] != 0.0:
        raise RuntimeError(f"resumed steps differ from continued ones: {summary['resume_check']}")
    rows = [json.loads(line) for line in (base / "work" / "metrics.jsonl").read_text().splitlines()]
    payload = sum(path.stat().st_size for path in (base / "out" / "payload").iterdir())
    return {
        "wall_seconds": round(time.monotonic() - began, 1),
        "phases_s": {name: round(seconds, 1) for name, seconds in phases.seconds.items()},
        "step_ms": [round(row["step_ms"]) for row in rows if "step_ms" in row],
        "loss": [round(row["loss"], 4) for row in rows if "loss" in row],
        "parameters": summary["parameters"],
        "payload_bytes": payload,
        "peak_disk_bytes": phases.peak_disk_bytes,
        "peak_device_bytes": summary.get("peak_device_bytes"),
        "resume_check": summary["resume_check"],
        "layout": summary["layout"],
    }


@contextmanager
def workplace(directory: Path | None) -> Iterator[Path]:
    """Make a directory for everything that is written, and remove it."""
    with tempfile.TemporaryDirectory(prefix="full_training_", dir=directory) as made:
        yield Path(made)


def main() -> None:
    """Measure, print, and with --record remember."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--experiment", default="bench", help="name, or path of a .toml file")
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--nproc", type=int, default=2, help="data-parallel ranks (default: 2)")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--backend", help="instead of the experiment's")
    parser.add_argument("--layers", type=int, help="of the model, instead of all")
    parser.add_argument("--directory", type=Path, help="where to write (default: the temporary directory)")
    parser.add_argument("--record", action="store_true", help="append to results.jsonl")
    options = parser.parse_args()
    with workplace(options.directory) as base:
        job = make_job(
            options.experiment,
            base,
            steps=options.steps,
            nproc=options.nproc,
            device=options.device,
            backend=options.backend,
            layers=options.layers,
        )
        result = measure(job, base, nproc=options.nproc)
    if options.device == "cuda":
        result["gpu"] = torch.cuda.get_device_name(0)
    print(json.dumps({"name": "full_training", "experiment": options.experiment, **result}))
    if options.record:
        record(
            "full_training", result["wall_seconds"], "s", details={"experiment": options.experiment, **result}
        )


if __name__ == "__main__":
    main()
