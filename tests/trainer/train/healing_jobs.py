"""Tiny healing runs: mock healing text beside the mock conversations, and recipes of the dense rungs."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.trainer.train.train_jobs import EOD, SEQ_LEN, VOCAB, make_job
from trainer.contract.depth import inserted_layers
from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.job import Job

PARENT_LAYERS, LAYERS = 4, 8
NEW_LAYERS = inserted_layers(PARENT_LAYERS, LAYERS)
PHASE = 4
STEPS = 8


def write_text(root: Path, *, rows: int = 60, valid: int = 20, seed: int = 0, sha256: str = "0" * 64) -> Path:
    """Writes a mock `healing_text_v1` with a manifest; each token follows from the one before."""
    rng = np.random.default_rng(seed)
    for split, count in (("train", rows), ("valid", valid)):
        (root / split).mkdir(parents=True)
        prefix = str(root / split / "healing_text_v1_tokens")
        builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
        for _ in range(count):
            length = int(rng.integers(10, 90))
            tokens = (int(rng.integers(0, VOCAB - 1)) + 7 * np.arange(length)) % (VOCAB - 1)
            tokens[-1] = EOD
            builder.add_document(torch.from_numpy(tokens.astype(np.int32)), [length])
        builder.finalize(f"{prefix}.idx")
    manifest = {
        "schema_version": "healing_text_v1",
        "config_hash": "1" * 64,
        "tokenizer": {"type": "mock", "model_path": "none", "model_sha256": sha256, "vocab_size": VOCAB},
        "config": {"eod_token_id": EOD},
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def healing_recipe(rung: str = "vpdense_80", **changes: Any) -> dict[str, Any]:
    """Smoke's healing run of a rung in width 32, half of it conversations; `changes` by dotted key.

    The deep rung has 8 layers, of which 5 to 8 are new and train alone for the first 4 of 8 steps.
    """
    recipe = copy.deepcopy(plain(load_experiment("smoke").train_recipe(f"{rung}_healed")))
    deep = rung == "vpdense_80"
    architecture = recipe["architecture"]
    architecture["vocab_size"] = VOCAB
    architecture["model"] |= {"num_layers": LAYERS if deep else PARENT_LAYERS, "hidden_size": 32}
    architecture["model"] |= {"head_dim": 8, "ffn_hidden_size": 16}
    architecture["attention"]["max_sequence_length"] = SEQ_LEN
    if architecture["attention"]["window_size"]:
        architecture["attention"]["window_size"] = 8
    recipe |= {"steps": STEPS, "seq_len": SEQ_LEN, "pack_block": 32, "init": "fresh", "harmony_fraction": 0.4}
    if deep:
        recipe |= {"new_layers_only_steps": PHASE, "new_layers": list(NEW_LAYERS)}
    recipe["training"] |= {
        "global_batch_size": 4,
        "micro_batch_size": 1,
        "save_interval": 2,
        "eval_interval": 4,
        "keep_last": 8,
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        table = recipe
        for part in path:
            table = table[part]
        table[last] = value
    return recipe


def healing_job(base: Path, conversations: Path, text: Path, recipe: dict[str, Any], **options: Any) -> Job:
    """A job with both data sets among its inputs."""
    inputs = {"healing_text_v1": text, **options.pop("inputs", {})}
    return make_job(base, conversations, recipe=recipe, inputs=inputs, **options)
