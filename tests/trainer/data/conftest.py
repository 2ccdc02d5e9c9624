"""Data sets written with Megatron's own builder, independently of the project's writer."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

EOD = 199_999


def conversation(length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Random tokens ending with EOD, with a label-aligned mask and span: prompt, reasoning, final."""
    tokens = generator.integers(0, EOD, size=length)
    tokens[-1] = EOD
    span = np.zeros(length, dtype=np.uint8)
    begin, middle = length // 4, length // 2
    span[begin:middle] = 1
    span[middle : length - 2] = 2  # predicts up to the terminator; EOD itself is never a target
    return tokens, (span > 0).astype(np.uint8), span


def write_pair(prefix: Path, sequences: list[np.ndarray], dtype: type) -> None:
    """One .bin/.idx pair."""
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for sequence in sequences:
        builder.add_document(torch.from_numpy(np.asarray(sequence)), [len(sequence)])
    builder.finalize(f"{prefix}.idx")


def write_shard(
    directory: Path, name: str, documents: list[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> None:
    """The three pairs of a shard."""
    for place, (kind, dtype) in enumerate((("tokens", np.int32), ("lossmask", np.uint8), ("span", np.uint8))):
        write_pair(directory / f"{name}_{kind}", [document[place] for document in documents], dtype)


class KDPayload:
    """A data set under construction: documents by split and shard, and the manifest that belongs to them."""

    def __init__(self, root: Path):
        self.root = root
        self.documents: dict[str, dict[str, list]] = {}
        self.manifest: dict = {
            "schema_version": "synth_kd_v1",
            "config": {"eod_token_id": EOD, "loss_mask_alignment": "labels_shifted_with_pad"},
            "splits": {},
        }

    def add(self, split: str, name: str, documents: list) -> None:
        (self.root / split).mkdir(parents=True, exist_ok=True)
        write_shard(self.root / split, name, documents)
        self.documents.setdefault(split, {})[name] = documents
        entry = {
            "name": name,
            "rows": len(documents),
            "tokens": sum(len(document[0]) for document in documents),
        }
        self.manifest["splits"].setdefault(split, {"shards": []})["shards"].append(entry)
        self.save()

    def rewrite(self, split: str, name: str, document: int, change: Callable[..., None]) -> None:
        """Change one document's arrays on disk; lengths and manifest stay."""
        documents = [tuple(array.copy() for array in each) for each in self.documents[split][name]]
        change(*documents[document])
        write_shard(self.root / split, name, documents)

    def save(self) -> None:
        (self.root / "manifest.json").write_text(json.dumps(self.manifest))


@pytest.fixture
def kd_payload(tmp_path: Path) -> Callable[..., KDPayload]:
    """Make a payload from document lengths of each shard: ``kd_payload(train=[[5, 9], [4]])``."""

    def make(seed: int = 0, **splits: list[list[int]]) -> KDPayload:
        generator = np.random.default_rng(seed)
        payload = KDPayload(tmp_path / f"payload-{seed}")
        for split, shards in splits.items():
            for number, lengths in enumerate(shards):
                documents = [conversation(length, generator) for length in lengths]
                payload.add(split, f"shard_{number:02d}", documents)
        return payload

    return make


@pytest.fixture
def text_payload(tmp_path: Path) -> Callable[..., tuple[Path, list[np.ndarray]]]:
    """Make a plain-text payload from document lengths, EOD included: ``text_payload([5, 9])``."""

    def make(lengths: list[int], seed: int = 0) -> tuple[Path, list[np.ndarray]]:
        generator = np.random.default_rng(seed)
        documents = [np.append(generator.integers(0, EOD, size=length - 1), EOD) for length in lengths]
        root = tmp_path / f"text-{seed}"
        (root / "train").mkdir(parents=True)
        write_pair(root / "train" / "healing_text_v1_tokens", documents, np.int32)
        manifest = {"schema_version": "healing_text_v1", "config": {"eod_token_id": EOD}}
        (root / "manifest.json").write_text(json.dumps(manifest))
        return root, documents

    return make
