"""Document-aligned packing, in speed and fill, against the same rule with a linear bin search.

    python -m benchmarks.packing [--documents 100000] [--record]

One line of JSON. The comparator is best-fit decreasing that looks through all open bins for each document, in
numpy, on the first blocks of the same permutation; both must give the same bins.
"""

import argparse
import json
import time

import numpy as np
from numpy.typing import NDArray

from benchmarks.record import record
from trainer.data.packing import best_fit_decreasing, pack

_SEQ_LEN, _BLOCK = 2048, 1024


def corpus_lengths(documents: int) -> NDArray[np.int32]:
    """Lengths like those of the corpus: a bulk around 850 tokens, a heavier upper tail, cut at 2048."""
    generator = np.random.default_rng(0)
    tail = documents // 50
    bulk = generator.normal(845, 190, size=documents - tail)
    lengths = np.concatenate([bulk, generator.uniform(1300, _SEQ_LEN, size=tail)])
    generator.shuffle(lengths)
    return np.clip(lengths, 150, _SEQ_LEN).astype(np.int32)


def linear_search(lengths: NDArray[np.int32], capacity: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Best-fit decreasing over an array of the rooms of all open bins."""
    placement = np.argsort(-lengths.astype(np.int64), kind="stable")
    rooms = np.full(len(lengths), capacity, dtype=np.int64)
    assigned = np.empty(len(lengths), dtype=np.int64)
    opened = 0
    for place, length in enumerate(lengths[placement].tolist()):
        left = rooms[:opened] - length
        left[left < 0] = capacity + 1
        best = int(np.argmin(left)) if opened else 0
        if opened == 0 or left[best] > capacity:
            best = opened
            opened += 1
        rooms[best] -= length
        assigned[place] = best
    return placement[np.argsort(assigned, kind="stable")], np.bincount(assigned, minlength=opened)


def measure(documents: int) -> dict[str, float]:
    """Pack an epoch, and a part of it again with the linear search."""
    lengths = corpus_lengths(documents)
    start = time.perf_counter()
    _, sizes = pack(lengths, seq_len=_SEQ_LEN, block=_BLOCK, seed=1234, epoch=0)
    whole = time.perf_counter() - start

    blocks = [lengths[at : at + _BLOCK] for at in range(0, min(documents, 10 * _BLOCK), _BLOCK)]
    seconds = {}
    results = {}
    for name, rule in (("sorted", best_fit_decreasing), ("linear", linear_search)):
        start = time.perf_counter()
        results[name] = [rule(block, _SEQ_LEN) for block in blocks]
        seconds[name] = time.perf_counter() - start
    for found, expected in zip(results["sorted"], results["linear"], strict=True):
        assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    return {
        "documents": documents,
        "seq_len": _SEQ_LEN,
        "block": _BLOCK,
        "documents_per_s": documents / whole,
        "fill_ratio": float(lengths.sum(dtype=np.int64)) / (len(sizes) * _SEQ_LEN),
        "sorted_s": seconds["sorted"],
        "linear_s": seconds["linear"],
        "speed_ratio": seconds["linear"] / seconds["sorted"],
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--documents", type=int, default=100_000)
    parser.add_argument("--record", action="store_true", help="append the result to results.jsonl")
    arguments = parser.parse_args()
    found = measure(arguments.documents)
    print(json.dumps(found))
    if arguments.record:
        record(
            "packing",
            found["documents_per_s"],
            "documents/s",
            comparator="the same rule with a linear search for the bin (block packing alone)",
            ratio=found["speed_ratio"],
            details=found,
        )


if __name__ == "__main__":
    main()
