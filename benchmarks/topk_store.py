"""The top-K store on a trained model's distributions: bytes, decoding speed, memory, against plain layouts.

    python -m benchmarks.topk_store DUMP.npz [DUMP.npz …] [--record]

Dumps come from `benchmarks.topk_distributions`; of several, of one model, the sequences follow one another.
In one run: bytes per token of the store (whole files, K = 32, with and without 8 draws; K adaptive up to a
mass of .95), by column, and of its second half, where the table of ids has seen more; of plain int32 + fp16,
of zstandard over plain blocks, and of a tar of zstandard tensors for each batch of 4,096 tokens. Decoding
runs on one pinned core, by the clock of its thread. Peak memory is that of writing and reading one and four
times the tokens.
"""

import argparse
import io
import json
import os
import tarfile
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import zstandard
from numpy.typing import NDArray

from benchmarks.record import record
from trainer.contract.topk.identity import StoreIdentity
from trainer.contract.topk.manifest import write_manifest
from trainer.contract.topk.records import TopKRecords
from trainer.contract.topk.shard_reader import TopKShard
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.writer import TopKShardWriter

TOPK, ERROR, BATCH = 32, 0.01, 4096
PLAIN = 6 * TOPK


def load(dumps: list[Path]) -> tuple[str, int, list[dict[str, NDArray[Any]]]]:
    """Return the model, its vocabulary and the arrays of each sequence."""
    sequences: list[dict[str, NDArray[Any]]] = []
    names = ("label_logprob", "ids", "logprobs", f"draws{TOPK}")
    for dump in dumps:
        with np.load(dump) as content:
            model, vocabulary = str(content["model"]), int(content["vocabulary"])
            ends = np.cumsum(content["lengths"])
            arrays = {name: content[name] for name in names}
        for begin, end in zip(np.concatenate([[0], ends]), ends, strict=False):
            sequences.append({name: array[begin:end] for name, array in arrays.items()})
    return model, vocabulary, sequences


def records(sequence: dict[str, NDArray[Any]], identity: StoreIdentity) -> TopKRecords:
    """Return what a store of this identity keeps of a sequence."""
    ids = sequence["ids"][:, : identity.topk].astype(np.int32)
    logprobs = np.minimum(sequence["logprobs"][:, : identity.topk], 0).astype(np.float32)
    probabilities = np.exp(logprobs.astype(np.float64))
    if identity.mass is not None:
        behind = np.cumsum(probabilities, axis=1) - probabilities >= identity.mass
        ids, logprobs = np.where(behind, np.int32(-1), ids), np.where(behind, np.float32(-np.inf), logprobs)
    tail = np.clip(1 - np.exp(logprobs.astype(np.float64)).sum(axis=1), 0, 1).astype(np.float32)
    draws = sequence[f"draws{TOPK}"][:, : identity.tail_draws].astype(np.int32)
    draws = np.where((tail > 0)[:, None], draws, np.int32(-1))
    label = np.minimum(sequence["label_logprob"], 0).astype(np.float32)
    return TopKRecords(label, ids, logprobs, tail, draws)


def write(root: Path, identity: StoreIdentity, given: list[TopKRecords], times: int = 1) -> TopKShard:
    """Write a store of one shard, the sequences so many times one behind the other; open the shard."""
    (root / "train").mkdir(parents=True)
    path = root / "train" / "shard_00.topk"
    writer = TopKShardWriter(path, identity, split="train", shard=0)
    for repeat in range(times):
        for number, some in enumerate(given):
            writer.add(repeat * len(given) + number, some)
    entry = writer.close()
    write_manifest(root, identity, {"train": [entry]}, {})
    return TopKShard(path, identity, split="train", shard=0, entry=entry)


def tokens_per_second(tokens: int, decode: Callable[[], object], repeats: int = 40) -> float:
    """Return the best speed of decoding so many tokens."""
    best = float("inf")
    for _ in range(repeats):
        begin = time.thread_time()
        decode()
        best = min(best, time.thread_time() - begin)
    return tokens / best


def read_all(shard: TopKShard) -> list[int]:
    """Decode every block; return the tokens of each."""
    return [len(shard.read_block(block)[1]) for block in range(shard.blocks)]


def write_and_read(root: Path, identity: StoreIdentity, given: list[TopKRecords], times: int) -> None:
    """Write a store and decode all of it, a block at a time."""
    read_all(write(root, identity, given, times))


def plain_blocks(given: list[TopKRecords]) -> list[tuple[bytes, bytes]]:
    """Return ids as int32 and log-probs as fp16, by batches of `BATCH` tokens."""
    ids = np.concatenate([some.ids for some in given])
    logprobs = np.concatenate([some.logprobs for some in given]).astype(np.float16)
    return [
        (ids[at : at + BATCH].tobytes(), logprobs[at : at + BATCH].tobytes())
        for at in range(0, len(ids), BATCH)
    ]


def tar_of(batch: tuple[bytes, bytes]) -> bytes:
    """Return a tar of two zstandard tensors."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, content in zip(("ids", "logprobs"), batch, strict=True):
            packed = zstandard.compress(content, 3)
            member = tarfile.TarInfo(name)
            member.size = len(packed)
            archive.addfile(member, io.BytesIO(packed))
    return out.getvalue()


def untar(content: bytes) -> list[bytes]:
    """Undo `tar_of`."""
    parts = []
    with tarfile.open(fileobj=io.BytesIO(content)) as archive:
        for member in archive:
            stream = archive.extractfile(member)
            assert stream is not None, "every member is a file"
            parts.append(zstandard.decompress(stream.read()))
    return parts


def columns(shard: TopKShard, identity: StoreIdentity) -> dict[str, float]:
    """Return bytes per token of each kind of column, without tables and index."""
    groups = len({k.bit_length() for k in range(identity.topk)})
    planes = 4
    order = [("counts", planes)] if identity.mass is not None else []
    order += [("phases", 1), ("pages", groups), ("local numbers", groups), ("other numbers", 1)]
    order += [("wide ranks", planes), ("gaps", groups), ("far gaps", planes), ("tails", planes)]
    order += [("labels", 2 * planes)] + [("draws", 3 + planes)] * (identity.tail_draws > 0)
    kinds = [name for name, count in order for _ in range(count)]
    sizes = dict.fromkeys(kinds, 0)
    tokens = 0
    for block in range(shard.blocks):
        sequences, payload = shard._open_block(block)
        tokens += int(sequences.starts[-1])
        at = 0
        for kind in kinds:
            size = 4 + int.from_bytes(payload[at : at + 4], "little")
            sizes[kind] += size
            at += size
        assert at == len(payload), "the columns are others than those that the block has"
    return {kind: round(size / tokens, 2) for kind, size in sizes.items()}


def peak(action: Callable[[], object]) -> float:
    """Return by how many MiB the resident memory rose at its peak."""
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here

    def status(key: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(key))

    before = status("VmRSS")
    action()
    return (status("VmHWM") - before) / 1024


def half(shard: TopKShard) -> float:
    """Return bytes per token of the second half of the blocks."""
    later = shard._index[shard.blocks // 2 :]
    size = shard.path.stat().st_size - later[0].offset
    return size / sum(entry.tokens for entry in later)


def measure(given: list[dict[str, NDArray[Any]]], identity: StoreIdentity, root: Path) -> dict[str, Any]:
    """Write and read one store; return its figures."""
    some = [records(sequence, identity) for sequence in given]
    tokens = sum(map(len, some))
    begin = time.thread_time()
    shard = write(root, identity, some)
    writing = tokens / (time.thread_time() - begin)
    store, worst = TopKStore(root), 0.0
    for number, wanted in enumerate(some):
        found = store.read("train", 0, number)
        assert np.array_equal(found.ids, wanted.ids)
        assert np.array_equal(found.draws, wanted.draws)
        kept = np.isfinite(wanted.logprobs)
        worst = max(worst, float(np.abs(found.logprobs[kept] - wanted.logprobs[kept]).max()))
        worst = max(worst, float(np.abs(found.label_logprob - wanted.label_logprob).max()))
    return {
        "bytes": round(shard.path.stat().st_size / tokens, 2),
        "bytes of the second half": round(half(shard), 2),
        "columns": columns(shard, identity),
        "ids": round(float(np.mean([some.counts.mean() for some in some])), 1),
        "largest error": round(worst, 5),
        "decoded tokens/s": round(tokens_per_second(tokens, lambda: read_all(shard))),
        "written tokens/s": round(writing),
    }


def main() -> None:
    """Measure, print, and record if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("dumps", type=Path, nargs="+")
    parser.add_argument("--record", action="store_true")
    options = parser.parse_args()
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    model, vocabulary, given = load(options.dumps)
    identity = StoreIdentity(
        {"kind": "dump", "model": model}, "", "", 1.0, vocabulary, TOPK, logprob_error=ERROR
    )
    plain_records = [records(sequence, identity) for sequence in given]
    tokens = sum(map(len, plain_records))
    batches = plain_blocks(plain_records)
    zipped = [(zstandard.compress(ids, 3), zstandard.compress(logprobs, 3)) for ids, logprobs in batches]
    tars = [tar_of(batch) for batch in batches]
    result: dict[str, Any] = {"model": model, "vocabulary": vocabulary, "tokens": tokens}
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        terms = {
            "K = 32": identity,
            "K = 32 and 8 draws": replace(identity, tail_draws=8),
            "K to a mass of .95": replace(identity, mass=0.95),
        }
        for number, (name, term) in enumerate(terms.items()):
            result[name] = measure(given, term, root / str(number))
        result["plain int32 + fp16"] = {"bytes": PLAIN}
        result["zstandard of plain"] = {
            "bytes": round(sum(len(a) + len(b) for a, b in zipped) / tokens, 2),
            "decoded tokens/s": round(
                tokens_per_second(
                    tokens, lambda: [zstandard.decompress(part) for pair in zipped for part in pair]
                )
            ),
        }
        result["a tar of zstandard tensors"] = {
            "bytes": round(sum(map(len, tars)) / tokens, 2),
            "decoded tokens/s": round(
                tokens_per_second(tokens, lambda: [untar(content) for content in tars])
            ),
        }
        for times in (1, 4):
            place = root / f"memory{times}"
            result[f"peak MiB, {times} x tokens"] = round(
                peak(partial(write_and_read, place, identity, plain_records, times)), 1
            )
    print(json.dumps(result, indent=1))
    if options.record:
        for name, key in (("topk_store_bytes", "K = 32"), ("topk_store_bytes_draws", "K = 32 and 8 draws")):
            size = result[key]["bytes"]
            record(
                name,
                size,
                "B/token",
                comparator="plain int32 + fp16",
                ratio=PLAIN / size,
                details={"model": model, "tokens": tokens, **result[key]},
            )
        speed = result["K = 32"]["decoded tokens/s"]
        other = result["a tar of zstandard tensors"]["decoded tokens/s"]
        record(
            "topk_store_decode",
            speed,
            "tokens/s on one core",
            comparator="a tar of zstandard tensors",
            ratio=speed / other,
            details={key: value for key, value in result.items() if not key.startswith("K =")},
        )


if __name__ == "__main__":
    main()
