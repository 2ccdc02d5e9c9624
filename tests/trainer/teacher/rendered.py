"""Real conversations as training shards, rendered as the data path does."""

import json
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

from trainer.checkpoints.tokenizers import RANKS_SHA256
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.harmony.conversation import messages
from vpmoe_assets.harmony.render import Renderer

TEXTS = (("What is 2+2?", "2+2=4.", "4"), ("Name a prime.", "Two is one.", "2"))


def write_rendered(root: Path, ranks: Path) -> Path:
    """A `synth_kd_v1` of two conversations in each split."""
    renderer = Renderer(ranks)
    splits = {}
    for split in ("train", "valid"):
        (root / split).mkdir(parents=True)
        prefix = root / split / "shard_00"
        builders = {
            kind: IndexedDatasetBuilder(f"{prefix}_{kind}.bin", dtype=dtype)
            for kind, dtype in (("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8))
        }
        total = 0
        for query, reasoning, answer in TEXTS:
            row = {
                "query": query,
                "synthetic_reasoning": reasoning,
                "synthetic_answer": answer,
                "synth_id": query,
            }
            made = renderer.render(messages(row, Scaffold()))
            for builder, array in zip(builders.values(), (made.tokens, made.mask, made.span), strict=True):
                builder.add_document(torch.from_numpy(array), [len(array)])
            total += len(made.tokens)
        for kind, builder in builders.items():
            builder.finalize(f"{prefix}_{kind}.idx")
        splits[split] = {"shards": [{"name": "shard_00", "rows": len(TEXTS), "tokens": total}]}
    manifest = {
        "schema_version": "synth_kd_v1",
        "tokenizer": {"type": "o200k_harmony", "model_sha256": RANKS_SHA256, "vocab_size": 201_088},
        "config": {"eod_token_id": 199_999, "loss_mask_alignment": "labels_shifted_with_pad"},
        "splits": splits,
    }
    (root / "manifest.json").write_text(json.dumps(manifest))
    return root
