"""Tiny text, donors and checkpoints for the tests of calibration, refit and morph."""

import json
from pathlib import Path

import numpy as np
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

EOD = 90


def write_text(root: Path, lengths: list[int], seed: int = 0) -> list[np.ndarray]:
    """A plain-text data set of documents of these lengths, EOD included, with ids below 90."""
    generator = np.random.default_rng(seed)
    documents = [np.append(generator.integers(1, EOD, size=length - 1), EOD) for length in lengths]
    (root / "train").mkdir(parents=True, exist_ok=True)
    prefix = root / "train" / "healing_text_v1_tokens"
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=np.int32)
    for document in documents:
        builder.add_document(torch.from_numpy(document), [len(document)])
    builder.finalize(f"{prefix}.idx")
    manifest = {"schema_version": "healing_text_v1", "config": {"eod_token_id": EOD}}
    (root / "manifest.json").write_text(json.dumps(manifest))
    return documents
