"""Chunked cross-entropy against `torch.nn.functional.cross_entropy` on all logits: time and peak memory.

    python -m benchmarks.cross_entropy [--tokens 1024] [--hidden 64] [--vocabulary 201088] [--record]

One line of JSON: medians of both in the same process, alternating, and their ratio (above 1: chunked is
faster).
"""

import argparse
import json
import statistics
import threading
import time
from collections.abc import Callable

import psutil
import torch
import torch.nn.functional as F

from benchmarks.record import record
from trainer.model.cross_entropy import chunked_cross_entropy


def plain(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """All logits at once, in float32 like the chunked loss."""
    return (F.cross_entropy((hidden @ head.t()).float(), labels, reduction="none") * weights).sum()


def chunked(
    hidden: torch.Tensor, head: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Return the loss under test."""
    return chunked_cross_entropy(hidden, head, labels, weights)[0]


class PeakMemory:
    """Peak bytes over a block: of the CUDA allocator, or of the process, sampled each millisecond."""

    def __init__(self, device: str):
        self._cuda = device == "cuda"
        self.bytes = 0

    def __enter__(self) -> "PeakMemory":
        if self._cuda:
            torch.cuda.reset_peak_memory_stats()
            self._before = torch.cuda.memory_allocated()
            return self
        process = psutil.Process()
        self._before = process.memory_info().rss
        self._stop = threading.Event()

        def sample() -> None:
            while not self._stop.wait(0.001):
                self.bytes = max(self.bytes, process.memory_info().rss - self._before)

        self._thread = threading.Thread(target=sample)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._cuda:
            self.bytes = torch.cuda.max_memory_allocated() - self._before
        else:
            self._stop.set()
            self._thread.join()


def measure(tokens: int, hidden_size: int, vocabulary: int, repeats: int) -> dict[str, float]:
    """Alternate both losses, forward and backward.

    Args:
        tokens: Tokens of the micro-batch, all supervised.
        hidden_size: Width of the hidden states.
        vocabulary: Rows of the head.
        repeats: Timed runs of each, after one that is not timed.

    Returns:
        Seconds, peak MiB, and their ratios.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(tokens, hidden_size, generator=generator).to(device, dtype).requires_grad_()
    head = (
        (torch.randn(vocabulary, hidden_size, generator=generator) * 0.02).to(device, dtype).requires_grad_()
    )
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    weights = torch.full((tokens,), 1 / tokens, device=device)
    losses: dict[str, Callable[..., torch.Tensor]] = {"plain": plain, "chunked": chunked}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    peak = dict.fromkeys(losses, 0)
    values = {}
    for _ in range(repeats + 1):
        for name, loss in losses.items():
            hidden.grad = head.grad = None
            with PeakMemory(device) as memory:
                start = time.perf_counter()
                value = loss(hidden, head, labels, weights)
                value.backward()
                values[name] = value.item()  # waits for the device
                seconds[name].append(time.perf_counter() - start)
            peak[name] = max(peak[name], memory.bytes)
    assert abs(values["plain"] - values["chunked"]) < 1e-2 * values["plain"]
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "hidden": hidden_size,
        "vocabulary": vocabulary,
        "plain_s": median["plain"],
        "chunked_s": median["chunked"],
        "speed_ratio": median["plain"] / median["chunked"],
        "plain_peak_mib": peak["plain"] / 2**20,
        "chunked_peak_mib": peak["chunked"] / 2**20,
        "memory_ratio": peak["plain"] / max(peak["chunked"], 1),
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=201_088)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the results to results.jsonl")
    arguments = parser.parse_args()
    found = measure(arguments.tokens, arguments.hidden, arguments.vocabulary, arguments.repeats)
    print(json.dumps(found))
    if arguments.record:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # the record's GPU may be there and unused
        shape = f"{arguments.tokens}x{arguments.hidden}x{arguments.vocabulary}"
        for name, value, unit, kind in (
            ("speed", arguments.tokens / found["chunked_s"], "tokens/s", "speed_ratio"),
            ("memory", found["chunked_peak_mib"], "MiB at peak (ratio: times less)", "memory_ratio"),
        ):
            record(
                f"cross_entropy.{device}.{name}.{shape}",
                value,
                unit,
                comparator="torch cross_entropy on all logits",
                ratio=found[kind],
                details={**found, "dtype": "bfloat16" if device == "cuda" else "float32"},
            )


if __name__ == "__main__":
    main()
