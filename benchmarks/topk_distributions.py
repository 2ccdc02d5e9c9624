"""A trained model's distributions on real conversations, dumped for `benchmarks.topk_store`.

    python -m benchmarks.topk_distributions MODEL OUT.npz --rows ROWS.parquet [--first 0] [--tokens 4000]

`MODEL` is any directory of a causal language model that transformers loads with its tokenizer. The rows have
columns `query`, `synthetic_reasoning` and `synthetic_answer`. Dumped are the positions of the last two: the
128 likeliest ids with log-probs, the log-prob of the token there, and draws from the tails of 24 and of 32.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

KEPT = 128
DRAWS = 8
TAILS = (24, 32)


def conversations(rows: Path, tokenizer: Any, first: int) -> list[tuple[list[int], int]]:
    """Return token ids of the conversations from one row on, and where the response begins in each."""
    table = pq.read_table(rows, columns=["query", "synthetic_reasoning", "synthetic_answer"]).slice(first)
    found = []
    for row in table.to_pylist():
        prompt = tokenizer.encode(row["query"] + "\n\n")
        response = tokenizer.encode(row["synthetic_reasoning"] + "\n\n" + row["synthetic_answer"])
        found.append((prompt + response, len(prompt)))
    return found


@torch.no_grad()
def distributions(model: Any, tokens: list[int], begin: int, seed: int) -> dict[str, np.ndarray]:
    """Return what is kept of the distributions at the positions that predict `tokens[begin:]`."""
    logits = model(torch.tensor([tokens]), logits_to_keep=len(tokens) - begin + 1).logits[0, :-1]
    generator = torch.Generator().manual_seed(seed)
    labels = torch.tensor(tokens[begin:])
    parts: dict[str, list[torch.Tensor]] = {}
    for some, label in zip(logits.split(64), labels.split(64), strict=True):
        logprobs = some.float().log_softmax(-1)
        values, ids = logprobs.topk(KEPT)
        part = {
            "label_logprob": logprobs.gather(1, label[:, None])[:, 0],
            "logprobs": values,
            "ids": ids.int(),
        }
        for kept in TAILS:
            ladder = logprobs.exp().scatter(1, ids[:, :kept], 0.0).double().cumsum(1)
            heights = torch.rand(len(some), DRAWS, generator=generator, dtype=torch.float64) * ladder[:, -1:]
            part[f"draws{kept}"] = torch.searchsorted(ladder, heights).int()
        for name, value in part.items():
            parts.setdefault(name, []).append(value)
    return {name: torch.cat(values).numpy() for name, values in parts.items()}


def main() -> None:
    """Dump until there are enough tokens."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--first", type=int, default=0, help="row to begin with")
    parser.add_argument("--tokens", type=int, default=4000, help="stop at so many")
    parser.add_argument("--seconds", type=float, default=math.inf, help="or after so long")
    given = parser.parse_args()
    started = time.monotonic()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    parts: list[dict[str, np.ndarray]] = []
    lengths: list[int] = []
    for number, (tokens, begin) in enumerate(conversations(given.rows, tokenizer, given.first), given.first):
        parts.append(distributions(model, tokens, begin, number))
        lengths.append(len(parts[-1]["ids"]))
        print(f"row {number}: {sum(lengths)} tokens", flush=True)
        if sum(lengths) >= given.tokens or time.monotonic() - started > given.seconds:
            break
    arrays = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    arrays["model"] = np.array(given.model.name)
    arrays["vocabulary"] = np.array(model.config.vocab_size)
    arrays["lengths"], arrays["next_row"] = np.array(lengths), np.array(given.first + len(lengths))
    np.savez(given.out, allow_pickle=False, **arrays)


if __name__ == "__main__":
    main()
