"""Generated tokens per second with the cache, against running the whole row for every token.

    python -m benchmarks.generate [--rows 4] [--prompt-tokens 512] [--new-tokens 32] [--record]

One line of JSON. The smoke student with random weights on this machine's CPU, fp32, greedy. Both ways take
the head at the last position only, and must give the same ids. They take turns; the best of each counts,
because other work on the machine only ever adds time.
"""

import argparse
import json
import time
from typing import Any

import torch

from benchmarks.record import record
from trainer.contract.schema.experiment import load_experiment
from trainer.decoding.generation import evaluating, generate
from trainer.model.gpt import VPGPTModel, build_model


def whole_rows(model: VPGPTModel, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
    """Greedy generation without a cache: prompts of one length, so no padding either."""
    rows = torch.tensor(prompts)
    with evaluating(model):
        for _ in range(new_tokens):
            positions = torch.arange(rows.shape[1]).expand_as(rows)
            hidden = model.forward_hidden(rows, positions, torch.zeros_like(rows))
            logits = torch.nn.functional.linear(hidden[-1], model.head_weight)
            rows = torch.cat((rows, logits.argmax(dim=1, keepdim=True)), dim=1)
    made: list[list[int]] = rows[:, len(prompts[0]) :].tolist()
    return made


def measure(rows: int, prompt_tokens: int, new_tokens: int, repeats: int) -> dict[str, Any]:
    """Time both ways, the prompt's own pass included."""
    architecture = load_experiment("smoke").architecture("vpmoe")
    model = build_model(architecture)
    generator = torch.Generator().manual_seed(0)
    shape = (rows, prompt_tokens)
    prompts = torch.randint(0, architecture.vocab_size, shape, generator=generator).tolist()
    best = {"cached": float("inf"), "whole rows": float("inf")}
    for _ in range(repeats):
        start = time.perf_counter()
        cached = [list(one.ids) for one in generate(model, prompts, max_new_tokens=new_tokens)]
        middle = time.perf_counter()
        whole = whole_rows(model, prompts, new_tokens)
        end = time.perf_counter()
        if cached != whole:
            raise AssertionError("the two ways gave different ids: this is no comparison of speed")
        best["cached"] = min(best["cached"], middle - start)
        best["whole rows"] = min(best["whole rows"], end - middle)
    return {
        "rows": rows,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "threads": torch.get_num_threads(),
        "tokens_per_s": rows * new_tokens / best["cached"],
        "whole_rows_tokens_per_s": rows * new_tokens / best["whole rows"],
        "speed_ratio": best["whole rows"] / best["cached"],
    }


def main() -> None:
    """Parse the arguments, measure, print."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--prompt-tokens", type=int, default=512)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the result to results.jsonl")
    arguments = parser.parse_args()
    found = measure(arguments.rows, arguments.prompt_tokens, arguments.new_tokens, arguments.repeats)
    print(json.dumps(found))
    if arguments.record:
        record(
            "generate, smoke student on a CPU",
            found["tokens_per_s"],
            "tokens/s",
            comparator="the whole row run again for every token",
            ratio=found["speed_ratio"],
            details=found,
        )


if __name__ == "__main__":
    main()
