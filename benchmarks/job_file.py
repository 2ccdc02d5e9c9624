"""The job file of a benchmark: a real job of the trainer, of inputs that no store knows."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.job import Job


def write_job(
    base: Path,
    *,
    command: str,
    asset: str,
    experiment: str,
    recipe: Mapping[str, Any],
    seed: int,
    inputs: Mapping[str, Path],
    execution: Mapping[str, Any],
) -> Path:
    """Write `base/job.json`, with `base/work` and `base/out` as its directories.

    Args:
        base: Directory of the job; made if it is not there.
        command: Trainer command.
        asset: Name that the job goes by.
        experiment: Name of the experiment.
        recipe: Resolved.
        seed: Of the job.
        inputs: Directory of each input by its name.
        execution: Device and layout; Weights & Biases is off.

    Returns:
        Its path.

    Raises:
        ConfigError: It is no valid job.
    """
    job = parse(
        Job,
        {
            "command": command,
            "asset": asset,
            "experiment": experiment,
            "recipe": dict(recipe),
            "recipe_fingerprint": f"benchmark {base.name}",
            "seed": seed,
            "inputs": {name: {"path": str(path), "digest": "made here"} for name, path in inputs.items()},
            "execution": {"wandb": "disabled", **execution},
            "provenance": dict.fromkeys(("git_sha", "source_digest", "lock_digest"), "benchmark")
            | {"git_dirty": False},
            "work_dir": str(base / "work"),
            "output_dir": str(base / "out"),
        },
    )
    base.mkdir(parents=True, exist_ok=True)
    path = base / "job.json"
    path.write_text(json.dumps(plain(job)), encoding="utf-8")
    return path
