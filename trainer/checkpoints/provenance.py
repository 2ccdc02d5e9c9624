"""`provenance.json` beside every resume checkpoint: where its content came from, without any secret."""

import hashlib
import json
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from trainer.contract.canonical import canonical_json
from trainer.contract.credentials import redact_command
from trainer.contract.geometry import geometry
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import plain
from trainer.contract.schema.job import Job
from trainer.job.distributed import Layout

SCHEMA = "vpmoe.provenance/1"
PACKAGES = (
    "torch",
    "megatron-core",
    "openai-harmony",
    "tiktoken",
    "transformers",
    "safetensors",
    "numpy",
    "triton",
)


def sha256_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def config_hash(recipe: Mapping[str, Any], seed: int) -> str:
    """sha256 over the canonical JSON of recipe and seed: equal for two runs of the same training.

    A fusion is another way to the same numbers, so a run may go on with other fusions, as it may on another
    number of ranks.

    Args:
        recipe: The resolved recipe of a training run as plain values.
        seed: The experiment's seed.
    """
    architecture = geometry(Architecture.model_validate(recipe["architecture"]))
    recipe = {**recipe, "architecture": plain(architecture)}
    return hashlib.sha256(canonical_json({"recipe": recipe, "seed": seed}).encode()).hexdigest()


def find_manifest(data: Path) -> Path | None:
    """`manifest.json` of a data set: in its directory, or beside it for an artifact's payload."""
    for candidate in (data / "manifest.json", data.parent / "manifest.json"):
        if candidate.is_file():
            return candidate
    return None


def packages() -> dict[str, str | None]:
    """Versions of python, CUDA and the packages that shape a result; None where one is not installed."""
    found: dict[str, str | None] = {"python": platform.python_version(), "cuda": torch.version.cuda}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = None
    return found


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the machine a result was computed on.

    Args:
        device: Device of this rank.
    """
    found: dict[str, Any] = {
        "host": platform.node(),
        "machine": platform.machine(),
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "gpu": None,
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = {
            "name": properties.name,
            "memory_bytes": properties.total_memory,
            "capability": f"{properties.major}.{properties.minor}",
            "visible": torch.cuda.device_count(),
        }
    return found


class Provenance:
    """Collects once, at the start of a run, what stays the same over its checkpoints.

    Args:
        job: The job.
        recipe: Its resolved recipe as plain values.
        layout: The parallel layout.
        started_unix_s: When this process began the run.
    """

    def __init__(self, job: Job, recipe: Mapping[str, Any], layout: Layout, *, started_unix_s: float) -> None:
        datasets, tokenizer, parents = {}, None, {}
        for name, given in job.inputs.items():
            path = Path(given.path)
            manifest = find_manifest(path)
            if (path / "config.json").is_file():
                parents[name] = _parent(path, given.digest)
            elif manifest is not None:
                content = json.loads(manifest.read_text(encoding="utf-8"))
                tokenizer = tokenizer or content.get("tokenizer")
                datasets[name] = {
                    "path": str(path),
                    "digest": given.digest,
                    "manifest_path": str(manifest),
                    "manifest_sha256": sha256_file(manifest),
                    "config_hash": content.get("config_hash"),
                }
            else:
                datasets[name] = {"path": str(path), "digest": given.digest, "manifest_path": None}
        self._fixed: dict[str, Any] = {
            "schema": SCHEMA,
            "asset": job.asset,
            "experiment": job.experiment,
            "code": job.provenance.model_dump(mode="json"),
            "recipe_fingerprint": job.recipe_fingerprint,
            "config": dict(recipe),
            "config_sha256": config_hash(recipe, job.seed),
            "seed": job.seed,
            "tokenizer": tokenizer,
            "datasets": datasets,
            "parents": parents,
            "packages": packages(),
            "hardware": hardware(layout.device),
            "command": redact_command(sys.argv),
            "layout": layout.describe(),
            "execution": job.execution.model_dump(mode="json"),
            "started_unix_s": started_unix_s,
        }

    def of(self, iteration: int, *, saved_unix_s: float, tokens: Mapping[str, int]) -> dict[str, Any]:
        """Return the provenance of one checkpoint.

        Args:
            iteration: Optimizer steps taken.
            saved_unix_s: Time of the save.
            tokens: Tokens consumed since step 0, in total and per span.
        """
        return {
            **self._fixed,
            "iteration": iteration,
            "saved_unix_s": saved_unix_s,
            "tokens_consumed": dict(tokens),
        }


def _parent(path: Path, digest: str) -> dict[str, Any]:
    """Return the checkpoint a run starts from; one from the store has its record beside its payload."""
    record = path.parent / ".artifact.json"
    identity = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    return {
        "path": str(path),
        "digest": digest,
        "id": "/".join(str(identity[key]) for key in ("experiment", "asset", "version"))
        if identity
        else None,
        "provenance_sha256": sha256_file(record if record.is_file() else path / "config.json"),
    }
