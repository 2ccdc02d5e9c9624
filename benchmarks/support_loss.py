"""Top-K divergence beside cross-entropy, both through the chunked head: what a teacher costs a step.

    python -m benchmarks.support_loss [--tokens 1024] [--hidden 64] [--topk 32] [--draws 0] [--record]

One line of JSON: medians of both in the same process, alternating, forward and backward, and the ratio
cross-entropy to divergence (1: the divergence is free).
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import torch

from benchmarks.cross_entropy import PeakMemory
from benchmarks.record import record
from trainer.contract.schema.distillation import Target
from trainer.losses.topk_kl import TokenRule
from trainer.model.cross_entropy import chunked_cross_entropy
from trainer.model.support_loss import chunked_support_loss


def measure(
    tokens: int, hidden_size: int, vocabulary: int, topk: int, draws: int, repeats: int
) -> dict[str, float]:
    """Alternate both losses, forward and backward.

    Args:
        tokens: Tokens of the micro-batch, all supervised and scored.
        hidden_size: Width of the hidden states.
        vocabulary: Rows of the head.
        topk: Kept ids of a token.
        draws: Draws from its tail; 0 for the target `bucket`, else `mix`.
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
    ids = torch.stack([torch.randperm(vocabulary, generator=generator)[:topk] for _ in range(tokens)])
    kept = torch.randn(tokens, topk + 1, generator=generator).log_softmax(dim=1).to(device)
    labels = torch.randint(vocabulary, (tokens,), generator=generator).to(device)
    everything = torch.ones(tokens, dtype=torch.bool, device=device)
    weights = torch.full((tokens,), 1 / tokens, device=device)
    batch = {
        "labels": labels[None],
        "teacher_ids": ids.to(device)[None],
        "teacher_logprobs": kept[None, :, :topk],
        "teacher_tail": kept[None, :, topk].exp(),
        "teacher_draws": torch.randint(vocabulary, (1, tokens, draws), generator=generator).to(device),
    }
    target: Target = "mix" if draws else "bucket"

    def cross_entropy() -> torch.Tensor:
        return chunked_cross_entropy(hidden, head, labels, weights, select=everything)[0]

    def divergence() -> torch.Tensor:
        rule = TokenRule(batch, everything[None], weights[None], target, 0.5, None)
        highest = torch.zeros(tokens, device=device)
        return chunked_support_loss(hidden, head, rule.support[0], rule, select=everything, highest=highest)[
            0
        ]

    losses: dict[str, Callable[[], torch.Tensor]] = {"cross_entropy": cross_entropy, "divergence": divergence}
    seconds: dict[str, list[float]] = {name: [] for name in losses}
    peak = dict.fromkeys(losses, 0)
    for _ in range(repeats + 1):
        for name, loss in losses.items():
            hidden.grad = head.grad = None
            with PeakMemory(device) as memory:
                start = time.perf_counter()
                value = loss()
                value.backward()
                value.item()  # waits for the device
                seconds[name].append(time.perf_counter() - start)
            peak[name] = max(peak[name], memory.bytes)
    median = {name: statistics.median(times[1:]) for name, times in seconds.items()}
    return {
        "threads": torch.get_num_threads(),
        "tokens": tokens,
        "hidden": hidden_size,
        "vocabulary": vocabulary,
        "topk": topk,
        "draws": draws,
        **{f"{name}_s": value for name, value in median.items()},
        "speed_ratio": median["cross_entropy"] / median["divergence"],
        **{f"{name}_peak_mib": value / 2**20 for name, value in peak.items()},
        "memory_ratio": peak["cross_entropy"] / max(peak["divergence"], 1),
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tokens", type=int, default=1024)
    parser.add_argument("--hidden", type=int, default=64)
    parser.add_argument("--vocabulary", type=int, default=201_088)
    parser.add_argument("--topk", type=int, default=32)
    parser.add_argument("--draws", type=int, default=0)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--record", action="store_true", help="append the results to results.jsonl")
    given = parser.parse_args()
    sizes = (given.tokens, given.hidden, given.vocabulary)
    found = measure(*sizes, given.topk, given.draws, given.repeats)
    print(json.dumps(found))
    if given.record:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # the record's GPU may be there and unused
        shape = "x".join(map(str, sizes)) + f".k{given.topk}m{given.draws}"
        details = {**found, "dtype": "bfloat16" if device == "cuda" else "float32"}
        for name, value, unit, ratio in (
            ("speed", given.tokens / found["divergence_s"], "tokens/s", "speed_ratio"),
            ("memory", found["divergence_peak_mib"], "MiB at peak (ratio: times less)", "memory_ratio"),
        ):
            record(
                f"support_loss.{device}.{name}.{shape}",
                value,
                unit,
                comparator="chunked cross-entropy",
                ratio=found[ratio],
                details=details,
            )


if __name__ == "__main__":
    main()
