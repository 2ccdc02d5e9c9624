"""The student answers the prompts of a round, each data-parallel rank a share of them.

Answers are sampled from the model as it stands, key-value cached and batched (`trainer.decoding`). The cache
of a batch is reserved once, at the longest prompt and `max_new_tokens`; rows leave the batch as they end, so
the number of rows is what changes shape from step to step, and a backend that captures graphs would pad it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from torch import nn

from trainer.decoding.generation import generate
from trainer.decoding.sampling import Sampling
from trainer.job.distributed import Layout
from trainer.rollouts.forms import Form
from trainer.rollouts.prompts import seed_of
from trainer.rollouts.rollout import Request, Rollout


@dataclass(frozen=True)
class Answering:
    """How answers are sampled.

    Attributes:
        seed: The experiment's.
        max_new_tokens: Of an answer.
        temperature: Of the distribution that is sampled; log-probabilities are those at 1 all the same.
        form: Says which ids end an answer.
        rows: Most sequences of a batch.
    """

    seed: int
    max_new_tokens: int
    temperature: float
    form: Form
    rows: int = 64

    def answer(
        self,
        model: nn.Module,
        requests: Sequence[Request],
        number: int,
        born: int,
        between: Callable[[], None] | None = None,
    ) -> list[Rollout]:
        """Sample an answer to each request.

        Args:
            model: The student.
            requests: Of one round.
            number: Of the round.
            born: Step after which the model's weights stand.
            between: Called before every step of the decoder.

        Raises:
            FloatingPointError: The model's logits are not finite.
        """
        made = generate(
            model,
            [request.prompt.tolist() for request in requests],
            max_new_tokens=self.max_new_tokens,
            stop=self.form.stop,
            sampling=Sampling(temperature=self.temperature),
            seeds=[seed_of(self.seed, request, number) for request in requests],
            rows=self.rows,
            between=between,
        )
        return [
            Rollout(
                request,
                number,
                born,
                np.array(answer.ids, dtype=np.int32),
                np.array(answer.logprobs, dtype=np.float32),
                answer.finish == "stop",
            )
            for request, answer in zip(requests, made, strict=True)
        ]


def share[T](items: Sequence[T], layout: Layout) -> list[T]:
    """Return this data-parallel rank's part of a round."""
    return list(items[layout.dp_rank :: layout.dp])


def attempted[T](work: Callable[[], Sequence[T]]) -> Sequence[T] | Exception:
    """Do a rank's part, or return the error that it met, for `gathered` to raise."""
    try:
        return work()
    except Exception as error:
        return error


def gathered[T](mine: Sequence[T] | Exception, count: int, layout: Layout) -> list[T]:
    """Put the parts of all ranks together again; collective over all ranks.

    Args:
        mine: This rank's part, of `share`, empty where another rank of its data-parallel place has it; or the
            error that it met, which so becomes one of every rank instead of leaving them to wait.
        count: Length of the whole.
        layout: The parallel layout.

    Raises:
        RuntimeError: Another rank failed; the failing rank raises its own exception.
    """
    if layout.world > 1:
        found: list[tuple[int, Sequence[T], str | None]] = [(0, (), None)] * layout.world
        own = (layout.dp_rank, (), str(mine)) if isinstance(mine, Exception) else (layout.dp_rank, mine, None)
        dist.all_gather_object(found, own)
    if isinstance(mine, Exception):
        raise mine
    if layout.world == 1:
        return list(mine)
    if failures := [text for _, _, text in found if text is not None]:
        raise RuntimeError(f"another rank failed: {failures[0]}")
    whole: list[T | None] = [None] * count
    for dp_rank, items, _ in found:
        if len(items):
            whole[dp_rank :: layout.dp] = items
    return [item for item in whole if item is not None]
