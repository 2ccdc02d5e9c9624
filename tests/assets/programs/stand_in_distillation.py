"""A trainer without a model that trains and scores: `stand_in_training`, and a store of made-up scores.

`python -m stand_in_distillation score --job job.json [--shard i --of n]`. The scores of a conversation follow
from its tokens alone: half of the labels are the most likely id. `STAND_IN` (JSON) may ask for
  die_at     shard at which it ends without a word
  shift      positions by which labels are off
  skip       every so many scored conversations, one is left out
"""

import argparse
import json
import os
import runpy
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.shard_file import shard_name
from trainer.contract.topk.subset import scored_sequence
from trainer.contract.topk.writer import TopKShardWriter
from vpmoe_assets.harmony.indexed import map_elements, read_index

VOCABULARY = 201_088


def records(tokens: np.ndarray, mask: np.ndarray, topk: int, draws: int, shift: int) -> TopKRecords:
    """Records of a conversation; the label is among the kept ids where the generator says so."""
    labels = np.roll(tokens, -1 - shift)[mask > 0]
    rng = np.random.default_rng(zlib.crc32(tokens.tobytes()))
    n = labels.size
    ids = (rng.integers(0, VOCABULARY // 2, (n, 1)) + 7919 * np.arange(topk)) % (VOCABULARY // 2)
    logprobs = np.sort(np.log(rng.dirichlet(np.ones(topk + 1), n)[:, :topk]), axis=1)[:, ::-1]
    label_logprob = logprobs[:, -1] - 1.0
    for row in np.flatnonzero(rng.random(n) < 0.5):
        if labels[row] not in ids[row]:
            ids[row, 0], label_logprob[row] = labels[row], logprobs[row, 0]
    for row in np.flatnonzero((ids == labels[:, None]).any(axis=1)):
        label_logprob[row] = logprobs[row][ids[row] == labels[row]][0]
    tail = np.clip(1.0 - np.exp(logprobs).sum(axis=1) - 1e-6, 0, 1)
    return TopKRecords(
        label_logprob.astype(np.float32),
        ids.astype(np.int32),
        logprobs.astype(np.float32),
        tail.astype(np.float32),
        rng.integers(VOCABULARY // 2, VOCABULARY, (n, draws)).astype(np.int32),
    )


def shards(data: Path) -> Iterator[tuple[str, int]]:
    for split in ("train", "valid"):
        for path in sorted((data / split).glob("*_tokens.idx")):
            yield split, int(path.name.split("_")[1])


def score(job: dict, share: tuple[int, int] | None, asked: dict) -> None:
    recipe, data = job["recipe"], Path(job["inputs"]["synth_kd_v1"]["path"])
    work = Path(job["work_dir"])
    manifest = json.loads((data.parent / "manifest.json").read_bytes())
    identity = StoreIdentity(
        teacher={
            "kind": "checkpoint",
            "digest": job["inputs"]["teacher"]["digest"],
            "reasoning_mode": "high",
        },
        tokenizer_sha256=manifest["tokenizer"]["model_sha256"],
        dataset_digest=job["inputs"]["synth_kd_v1"]["digest"],
        subset_fraction=recipe["subset_fraction"],
        vocabulary=VOCABULARY,
        topk=recipe["topk"],
        mass=recipe.get("mass"),
        tail_draws=recipe["tail_draws"],
        logprob_error=recipe["logprob_error"],
    )
    root = Path(job["output_dir"]) / "payload"
    entries: dict[str, list] = {"train": [], "valid": []}
    for split, number in shards(data):
        if share is not None and number % share[1] != share[0]:
            continue
        if number == asked.get("die_at"):
            os._exit(9)
        prefix = data / split / f"shard_{number:02d}_tokens"
        index = read_index(prefix.with_name(prefix.name + ".idx"))
        tokens = map_elements(prefix, index)
        mask_prefix = prefix.with_name(prefix.name.replace("tokens", "lossmask"))
        mask = map_elements(mask_prefix, read_index(mask_prefix.with_name(mask_prefix.name + ".idx")))
        (root / split).mkdir(parents=True, exist_ok=True)
        writer = TopKShardWriter(root / split / shard_name(number), identity, split=split, shard=number)
        ends = np.cumsum(index.lengths)
        for sequence, (start, end) in enumerate(zip(ends - index.lengths, ends, strict=True)):
            own = np.asarray(tokens[start:end])
            wanted = split == "valid" or scored_sequence(own, recipe["subset_fraction"])
            left_out = asked.get("skip") and sequence % asked["skip"] == 0
            if wanted and not left_out and not writer.finished and sequence >= writer.next_sequence:
                found = records(
                    own, mask[start:end], identity.topk, identity.tail_draws, asked.get("shift", 0)
                )
                writer.add(sequence, found)
        entries[split].append(writer.close())
        with (work / "log.txt").open("a") as log:
            log.write(f"{split} {number} by {'all' if share is None else share[0]}\n")
    if share is None:
        write_manifest(root, identity, entries, {"reasoning": -1.5, "final": -1.0})
        (root.parent / "summary.json").write_text(json.dumps({"tokens": 1}))
        (work / "STATUS").write_text("done\n")


if sys.argv[1] == "score":
    parser = argparse.ArgumentParser()
    parser.add_argument("command")
    parser.add_argument("--job", type=Path)
    parser.add_argument("--shard", type=int)
    parser.add_argument("--of", type=int)
    given = parser.parse_args()
    asked = json.loads(os.environ.get("STAND_IN", "{}"))
    (Path(json.loads(given.job.read_text())["work_dir"]) / "heartbeat").write_text("{}")
    score(json.loads(given.job.read_text()), None if given.of is None else (given.shard, given.of), asked)
else:
    runpy.run_module("stand_in_training", run_name="__main__")
