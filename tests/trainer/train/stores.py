"""Top-K stores of mock conversations: a teacher that says anything, but always the same."""

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np

from tests.trainer.train.train_jobs import VOCAB
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.subset import scored_sequence
from trainer.contract.topk.writer import TopKShardWriter
from trainer.data.indexed import SpanDocuments

TEACHER = {"kind": "checkpoint", "digest": "d" * 64, "reasoning_mode": "high"}


def identity(**changes: Any) -> StoreIdentity:
    """What the mock store of the mock conversations speaks of."""
    terms: dict[str, Any] = {
        "teacher": TEACHER,
        "tokenizer_sha256": "0" * 64,
        "dataset_digest": "d" * 64,
        "subset_fraction": 0.5,
        "vocabulary": VOCAB,
        "topk": 4,
        "tail_draws": 2,
    }
    return StoreIdentity(**(terms | changes))


def answers(labels: np.ndarray, terms: StoreIdentity) -> TopKRecords:
    """What the teacher says where these tokens follow: a distribution drawn from the tokens alone."""
    seed = int.from_bytes(hashlib.sha256(labels.astype("<i4").tobytes()).digest()[:8], "big")
    rng = np.random.default_rng(seed)
    n, vocabulary = len(labels), terms.vocabulary
    logits = 3 * rng.normal(size=(n, vocabulary))
    logprobs = logits - np.logaddexp.reduce(logits, axis=1, keepdims=True)
    order = np.argsort(-logprobs, axis=1, kind="stable")
    kept = np.take_along_axis(logprobs, order[:, : terms.topk], axis=1).astype(np.float32)
    return TopKRecords(
        label_logprob=np.take_along_axis(logprobs, labels[:, None].astype(np.int64), axis=1)[:, 0].astype(
            np.float32
        ),
        ids=order[:, : terms.topk].astype(np.int32),
        logprobs=kept,
        tail_mass=np.maximum(1 - np.exp(kept.astype(np.float64)).sum(axis=1), 0).astype(np.float32),
        draws=rng.choice(order[0, terms.topk :], size=(n, terms.tail_draws)).astype(np.int32)
        if n
        else np.empty((0, terms.tail_draws), np.int32),
    )


def write_store(
    root: Path,
    data: Path,
    terms: StoreIdentity | None = None,
    *,
    leave_out: tuple[str, int, int] | None = None,
) -> Path:
    """Score mock conversations.

    Args:
        root: Of the store.
        data: Of the conversations.
        terms: What the store says of itself.
        leave_out: Split, shard and sequence that no record is written of.
    """
    terms = terms or identity()
    shards: dict[str, list[dict[str, Any]]] = {}
    means: dict[str, list[float]] = {"reasoning": [], "final": []}
    for split in ("train", "valid"):
        documents = SpanDocuments(data, split)
        (root / split).mkdir(parents=True, exist_ok=True)
        for shard, place in documents.shards.items():
            writer = TopKShardWriter(
                root / split / f"shard_{shard:02d}.topk", terms, split=split, shard=shard
            )
            for sequence, document in enumerate(place):
                tokens, mask, span = documents[document]
                wanted = split == "valid" or scored_sequence(tokens, terms.subset_fraction)
                if not wanted or (split, shard, sequence) == leave_out:
                    continue
                said = answers(tokens[1:][mask[:-1] > 0], terms)
                writer.add(sequence, said)
                for number, name in ((1, "reasoning"), (2, "final")):
                    if split == "train":
                        means[name] += said.label_logprob[span[mask > 0] == number].tolist()
            shards.setdefault(split, []).append(writer.close())
    write_manifest(root, terms, shards, {name: float(np.mean(found)) for name, found in means.items()})
    return root


def change_manifest(root: Path, **changes: Any) -> None:
    """Make a store say another thing of itself, without its digest."""
    path = root / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
