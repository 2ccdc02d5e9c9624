"""Tiny on-policy runs: mock conversations in Harmony's tokens, a teacher with other weights, recipes."""

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from tests.trainer.train.train_jobs import make_job, tiny_recipe
from trainer.checkpoints.published import save_published
from trainer.checkpoints.tokenizers import RANKS_SHA256
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.distillation import KDConfig
from trainer.contract.schema.job import Job
from trainer.decoding.conversation import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    ENDOFTEXT,
    FINAL,
    MESSAGE,
    RETURN,
    START,
)
from trainer.job.distributed import session
from trainer.model.gpt import build_model
from trainer.rollouts.stored import MODE_IDS

VOCAB, SEQ_LEN, STEPS = 201_088, 48, 6
SYSTEM, USER = 17360, 1428


def write_harmony(root: Path, *, rows: int = 24, valid: int = 12, seed: int = 0) -> Path:
    """Writes mock `synth_kd_v1` shards of short conversations with all of Harmony's control tokens."""
    rng = np.random.default_rng(seed)
    splits: dict[str, Any] = {}
    for split, count in (("train", rows), ("valid", valid)):
        (root / split).mkdir(parents=True)
        prefix = str(root / split / "shard_00")
        builders = {
            kind: IndexedDatasetBuilder(f"{prefix}_{kind}.bin", dtype=dtype)
            for kind, dtype in (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8))
        }
        total = 0
        for _ in range(count):
            query, reasoning, answer = (rng.integers(0, 999, n).tolist() for n in rng.integers(1, 6, 3))
            system = [START, SYSTEM, MESSAGE, 30377, 289, 25, MODE_IDS["high"], END]
            prompt = [*system, START, USER, MESSAGE, *query, END]
            analysis = [START, ASSISTANT, CHANNEL, ANALYSIS, MESSAGE, *reasoning, END]
            final = [START, ASSISTANT, CHANNEL, FINAL, MESSAGE, *answer, RETURN]
            tokens = [*prompt, *analysis, *final, ENDOFTEXT]
            span = [0] * (len(prompt) - 1) + [1] * len(analysis) + [2] * len(final) + [0, 0]
            arrays = {"tokens": tokens, "lossmask": [int(one > 0) for one in span], "span": span}
            for kind, builder in builders.items():
                builder.add_document(torch.tensor(arrays[kind]), [len(tokens)])
            total += len(tokens)
        for kind, builder in builders.items():
            builder.finalize(f"{prefix}_{kind}.idx")
        shards = [{"name": "shard_00", "rows": count, "tokens": total}]
        splits[split] = {"rows": count, "tokens": total, "shards": shards}
    manifest = {
        "schema_version": "synth_kd_v1",
        "config_hash": "0" * 64,
        "tokenizer": {
            "type": "o200k",
            "model_path": "none",
            "model_sha256": RANKS_SHA256,
            "vocab_size": VOCAB,
        },
        "config": {"loss_mask_alignment": "labels_shifted_with_pad", "eod_token_id": ENDOFTEXT},
        "splits": splits,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root


def on_policy_recipe(**changes: Any) -> dict[str, Any]:
    """Four layers of width 16 over the real vocabulary, mostly rollouts; `changes` by dotted key."""
    recipe = tiny_recipe()
    architecture = recipe["architecture"]
    architecture["vocab_size"] = VOCAB
    architecture["model"] |= {"hidden_size": 16, "head_dim": 4}
    architecture["attention"] |= {"max_sequence_length": SEQ_LEN}
    recipe |= {"steps": STEPS, "seq_len": SEQ_LEN, "objective": "opd"}
    recipe["training"] |= {"global_batch_size": 4, "save_interval": 2, "eval_interval": 10}
    recipe["training"]["optimizer"] |= {"name": "sgd", "lr": 0.5}
    recipe["training"]["optimizer"] |= {"normuon_aux_lr": None, "decoupled_lr": None}
    recipe["kd"] = plain(KDConfig())
    phase = {"medium": 0.5, "high": 0.5}
    recipe["rollouts"] = {
        "anchor_fraction": 0.25,
        "max_new_tokens": 8,
        "buffer_size": 8,
        "max_staleness": 2,
        "delay": 1,
        "curriculum": [{"until": 0.5, "rollouts": 1, **phase}, {"until": 1.0, "rollouts": 2, **phase}],
    }
    for key, value in changes.items():
        *path, last = key.split(".")
        table = recipe
        for part in path:
            table = table[part]
        table[last] = value
    return copy.deepcopy(recipe)


def write_teacher(directory: Path) -> Path:
    """Publishes a model with weights of its own, in the shape of the recipe."""
    architecture = parse(Architecture, on_policy_recipe()["architecture"])
    with session("cpu"):
        model = build_model(architecture, dtype=torch.float32, device="cpu", seed=99)
        save_published(model, architecture, directory)
    return directory


def on_policy_job(
    base: Path, data: Path, teacher: Path, *, recipe: dict[str, Any] | None = None, **keys: Any
) -> Job:
    """An on-policy job."""
    return make_job(base, data, recipe=recipe or on_policy_recipe(), inputs={"teacher": teacher}, **keys)
