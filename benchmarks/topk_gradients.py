"""What a stored target teaches: error of the gradient at the output head against the full divergence.

    python -m benchmarks.topk_gradients MODEL --rows ROWS.parquet [--tokens 512] [--kl 1.3] [--record]

The teacher is a causal language model (any directory that transformers loads), the student the same model
with noise on its matrices, as much as it takes to be `--kl` nats away. Of the gradient of KL(teacher,
student) with respect to the head, summed over the response tokens of real conversations, the relative L2
error of what the targets give instead: a bucket of 32 ids and a tail, 24 ids and 8 draws (unbiased), and the
half of both. NumPy, float64, from both models' whole distributions; the draws are of a seed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.record import record
from benchmarks.topk_distributions import conversations

BUCKET, KEPT, DRAWS = 32, 24, 8
CHUNK = 128
EACH, PROBE = 128, 64
"""Response tokens of each conversation, and of the first one to find the noise with."""


class Noise:
    """Gaussian noise for each matrix of a model, its own standard deviation large, from one seed."""

    @torch.no_grad()
    def __init__(self, model: Any):
        generator = torch.Generator().manual_seed(0)
        self._matrices = [parameter for parameter in model.parameters() if parameter.ndim == 2]
        self._clean = [matrix.clone() for matrix in self._matrices]
        self._noise = [
            (torch.randn(matrix.shape, generator=generator) * matrix.float().std()).to(matrix.dtype)
            for matrix in self._matrices
        ]

    @torch.no_grad()
    def set(self, scale: float) -> None:
        """Make the model the clean one and `scale` times the noise."""
        for matrix, clean, noise in zip(self._matrices, self._clean, self._noise, strict=True):
            matrix.copy_(clean).add_(noise, alpha=scale)


@torch.no_grad()
def outputs(model: Any, tokens: list[int], begin: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states and log-probs at the positions that predict `tokens[begin:]`."""
    hidden = model.model(torch.tensor([tokens])).last_hidden_state[0, begin - 1 : -1]
    return hidden, model.lm_head(hidden).float().log_softmax(-1)


def divergence(teacher: torch.Tensor, student: torch.Tensor) -> float:
    """Return the mean KL of log-probs `[n, V]`."""
    return float((teacher.exp() * (teacher - student)).sum(-1).mean())


def bucket(q: NDArray[np.float64], p: NDArray[np.float64], order: NDArray[np.intp]) -> NDArray[np.float64]:
    """Gradient at the logits of a target of the ids in `order` and one bucket for all others, `[n, V]`."""
    rest = np.ones(q.shape, bool)
    np.put_along_axis(rest, order, False, axis=1)
    ratio = (q * rest).sum(axis=1) / (p * rest).sum(axis=1)
    return np.where(rest, p * (1 - ratio[:, None]), p - q)


def drawn(
    q: NDArray[np.float64], p: NDArray[np.float64], order: NDArray[np.intp], rng: np.random.Generator
) -> NDArray[np.float64]:
    """Gradient of the ids in `order` and draws from the tail, each of which weighs its share of the tail."""
    tail = np.array(q)
    np.put_along_axis(tail, order, 0.0, axis=1)
    ladder = np.cumsum(tail, axis=1)
    gradient = p - (q - tail)
    for row, heights in enumerate(rng.random((len(q), DRAWS))):
        mass = ladder[row, -1]
        ids = np.minimum(np.searchsorted(ladder[row], heights * mass, side="right"), q.shape[1] - 1)
        np.subtract.at(gradient[row], ids, mass / DRAWS)
    return gradient


def errors(pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]) -> dict[str, float]:
    """Return the relative error of each target, given hidden states, teacher's and student's log-probs."""
    rng = np.random.default_rng(0)
    sums: dict[str, NDArray[np.float64]] = {}
    for hidden, teacher, student in pairs:
        for begin in range(0, len(hidden), CHUNK):
            some = slice(begin, begin + CHUNK)
            h = hidden[some].double().numpy()
            q, p = teacher[some].double().exp().numpy(), student[some].double().exp().numpy()
            order = np.argpartition(-q, BUCKET, axis=1)[:, :BUCKET]
            order = np.take_along_axis(order, np.argsort(-np.take_along_axis(q, order, 1), axis=1), 1)
            full = p - q
            unbiased, small = drawn(q, p, order[:, :KEPT], rng), bucket(q, p, order[:, :KEPT])
            parts = {
                "full": full,
                "bucket of 32": bucket(q, p, order) - full,
                "24 and 8 draws, unbiased": unbiased - full,
                "24 and 8 draws, mixed": (unbiased + small) / 2 - full,
            }
            for name, gradient in parts.items():
                total = sums.setdefault(name, np.zeros((q.shape[1], h.shape[1])))
                total += gradient.T @ h
    whole = np.linalg.norm(sums.pop("full"))
    return {name: float(np.linalg.norm(total) / whole) for name, total in sums.items()}


def main() -> None:
    """Find the student, compute the errors, print them, and record them if asked to."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", type=Path)
    parser.add_argument("--rows", type=Path, required=True)
    parser.add_argument("--name", help="of the model in the result; its directory's by default")
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--kl", type=float, default=1.3, help="how far the student is, in nats")
    parser.add_argument("--record", action="store_true")
    given = parser.parse_args()
    tokenizer = AutoTokenizer.from_pretrained(given.model)
    model = AutoModelForCausalLM.from_pretrained(given.model, dtype="auto").eval()
    texts = conversations(given.rows, tokenizer, 0)
    noise = Noise(model)
    texts = [(whole[: begin + EACH], begin) for whole, begin in texts[: -(-given.tokens // EACH)]]
    clean = [outputs(model, *text)[1] for text in texts]
    low, high = 0.0, 1.0
    short, begin = texts[0][0][: texts[0][1] + PROBE], texts[0][1]
    for _ in range(6):
        noise.set((low + high) / 2)
        distance = divergence(clean[0][:PROBE], outputs(model, short, begin)[1])
        low, high = (low, (low + high) / 2) if distance > given.kl else ((low + high) / 2, high)
    noise.set(high)
    pairs: list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]] = []
    for (tokens, begin), teacher in zip(texts, clean, strict=True):
        hidden, student = outputs(model, tokens, begin)
        pairs.append((hidden, teacher, student))
    found = errors(pairs)
    details = {
        "teacher": given.name or given.model.name,
        "student": f"the teacher with noise of {high:.3f} standard deviations",
        "kl": float(np.mean([divergence(teacher, student) for _, teacher, student in pairs])),
        "tokens": sum(len(hidden) for hidden, _, _ in pairs),
        **found,
    }
    print(json.dumps(details))
    if given.record:
        mixed, plain = found["24 and 8 draws, mixed"], found["bucket of 32"]
        record(
            "topk_gradient_error",
            mixed,
            "relative L2 error, 24 ids and 8 draws, mixed",
            comparator="a bucket of 32 ids",
            ratio=plain / mixed,
            details=details,
        )


if __name__ == "__main__":
    main()
