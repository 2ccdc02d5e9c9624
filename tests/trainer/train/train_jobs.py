"""A tiny model, mock conversation shards and job files: what the training tests share."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.job import Job

ROOT = Path(__file__).resolve().parents[3]
VOCAB = 256
EOD = 255
SEQ_LEN = 64


def write_conversations(
    root: Path, *, rows: int = 120, valid: int = 24, seed: int = 0, vocab: int = VOCAB
) -> Path:
    """Writes mock `synth_kd_v1` shards with a manifest; each token follows from the one before."""
    rng = np.random.default_rng(seed)
    splits: dict[str, Any] = {}
    for split, count in (("train", rows), ("valid", valid)):
        shards = []
        for shard in range(2):
            name = f"shard_{shard:02d}"
            (root / split).mkdir(parents=True, exist_ok=True)
            prefix = str(root / split / name)
            builders = {
                kind: IndexedDatasetBuilder(f"{prefix}_{kind}.bin", dtype=dtype)
                for kind, dtype in (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8))
            }
            total = 0
            for _ in range(count // 2):
                prompt, analysis, final = (int(n) for n in rng.integers([4, 3, 2], [12, 16, 12]))
                length = prompt + analysis + final + 1
                tokens = (int(rng.integers(0, vocab - 1)) + 3 * np.arange(length)) % (vocab - 1)
                tokens[-1] = EOD if vocab == VOCAB else vocab - 1
                span = np.repeat([0, 1, 2, 0], [prompt - 1, analysis, final, 2]).astype(np.uint8)
                arrays = {
                    "tokens": tokens.astype(np.int32),
                    "lossmask": (span > 0).astype(np.uint8),
                    "span": span,
                }
                for kind, array in arrays.items():
                    builders[kind].add_document(torch.from_numpy(array), [len(array)])
                total += length
            for kind, builder in builders.items():
                builder.finalize(f"{prefix}_{kind}.idx")
            shards.append({"name": name, "rows": count // 2, "tokens": total})
        splits[split] = {"rows": count, "tokens": sum(s["tokens"] for s in shards), "shards": shards}
    manifest = {
        "schema_version": "synth_kd_v1",
        "config_hash": "0" * 64,
        "tokenizer": {"type": "mock", "model_path": "none", "model_sha256": "0" * 64, "vocab_size": vocab},
        "config": {
            "loss_mask_alignment": "labels_shifted_with_pad",
            "eod_token_id": EOD if vocab == VOCAB else vocab - 1,
        },
        "splits": splits,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def tiny_recipe(**changes: Any) -> dict[str, Any]:
    """Smoke's stage 1 with 4 layers of width 32, a vocabulary of 256, 8 steps; `changes` by dotted key."""
    recipe = copy.deepcopy(plain(load_experiment("smoke").train_recipe("vpmoe_stage1")))
    architecture = recipe["architecture"]
    architecture["vocab_size"] = VOCAB
    architecture["model"] |= {"num_layers": 4, "hidden_size": 32, "head_dim": 8, "ffn_hidden_size": 8}
    architecture["model"]["dense_ffn_hidden_size"] = 16
    architecture["attention"] |= {"window_size": 8, "max_sequence_length": SEQ_LEN}
    architecture["moe"] |= {"num_experts": 8, "shared_expert_size": 16}
    recipe |= {"steps": 8, "seq_len": SEQ_LEN, "pack_block": 32, "init": "fresh"}
    recipe["training"] |= {
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "save_interval": 3,
        "eval_interval": 4,
        "keep_last": 3,
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        table = recipe
        for part in path:
            table = table[part]
        table[last] = value
    return recipe


def make_job(
    base: Path,
    data: Path,
    *,
    recipe: dict[str, Any] | None = None,
    seed: int = 1234,
    inputs: dict[str, Path] | None = None,
    name: str = "run",
    experiment: str = "smoke",
    **execution: Any,
) -> Job:
    """A job with its work and output directories below `base`."""
    given = {"synth_kd_v1": data, **(inputs or {})}
    return parse(
        Job,
        {
            "schema": "vpmoe.job/1",
            "command": "train",
            "asset": "vpmoe_stage1",
            "experiment": experiment,
            "recipe": recipe or tiny_recipe(),
            "recipe_fingerprint": "f" * 64,
            "seed": seed,
            "inputs": {key: {"path": str(path), "digest": "d" * 64} for key, path in given.items()},
            "execution": {"device": "cpu", "wandb": "disabled", **execution},
            "provenance": {
                "git_sha": "a" * 40,
                "git_dirty": False,
                "source_digest": "b" * 64,
                "lock_digest": "c" * 64,
            },
            "work_dir": str(base / name / "work"),
            "output_dir": str(base / name / "out"),
        },
    )


def write_job(job: Job) -> Path:
    """Writes `job.json` beside the job's work directory."""
    path = Path(job.work_dir).parent / "job.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(plain(job)))
    return path


def environment(**more: str) -> dict[str, str]:
    """Environment of a trainer subprocess, which finds this checkout."""
    return os.environ | {"PYTHONPATH": str(ROOT)} | more


def command(
    job: Path, *flags: str, nproc: int = 1, program: tuple[str, ...] = ("-m", "trainer")
) -> list[str]:
    """Command line that runs a job in a subprocess, through torchrun where it needs several ranks."""
    rest = [*program, "train", "--job", str(job), *flags]
    if nproc == 1:
        return [sys.executable, *rest]
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={nproc}"]
    return [*run, *rest]


def run_job_process(job: Job, *flags: str, timeout: float = 120.0) -> subprocess.CompletedProcess[str]:
    """Runs a job to its end in a process of its own."""
    return subprocess.run(
        command(write_job(job), *flags, nproc=job.execution.nproc),
        env=environment(),
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def summary(job: Job) -> dict[str, Any]:
    """The finished job's summary."""
    return dict(json.loads((Path(job.output_dir) / "summary.json").read_text()))
