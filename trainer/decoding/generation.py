"""Generation: prompts in, token ids and their log-probabilities out, for our models and for `transformers`'.

from trainer.generate import generate
from trainer.sampling import Sampling

for made in generate(model, prompts, max_new_tokens=64, stop=(200002, 200012),
                     sampling=Sampling(temperature=1.0), seeds=range(len(prompts))):
    made.ids, made.logprobs, made.finish
"""

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from trainer.decoding.decoder import Decoder, open_decoder
from trainer.decoding.sampling import GREEDY, Chance, Sampling, choose

Watch = Callable[[int, int], None]


@dataclass(frozen=True)
class Generated:
    """What followed one prompt.

    Attributes:
        ids: New token ids; a stop id, where one ended the sequence, is the last.
        logprobs: Log-probability of each under the model itself: natural logarithm, temperature 1, no token
            excluded, whatever the sampling.
        finish: `stop` after a stop id, `length` after `max_new_tokens`.
    """

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: Literal["stop", "length"]


@dataclass
class _Sequence:
    """One sequence under way; `number` is its place among the prompts."""

    number: int
    chance: Chance
    ids: list[int]
    logprobs: list[float]
    stopped: bool = False

    def result(self) -> Generated:
        return Generated(tuple(self.ids), tuple(self.logprobs), "stop" if self.stopped else "length")


def generate(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    stop: Collection[int] = (),
    sampling: Sampling = GREEDY,
    seeds: Sequence[int] | None = None,
    rows: int = 32,
    watch: Watch | None = None,
    between: Callable[[], None] | None = None,
) -> list[Generated]:
    """Continue prompts.

    A sequence is a function of model, prompt, sampling and its own seed. Which prompts share a batch, and how
    many do, changes logits by round-off at the most, and never the random numbers. Equal prompts of a batch
    (several samples of one) are run once.

    Args:
        model: A `VPGPTModel` or a causal language model of `transformers`; in evaluation mode while it
            generates, afterwards as it was.
        prompts: Token ids, each at least one.
        max_new_tokens: At least 1.
        stop: Ids that end a sequence.
        sampling: Greedy by default.
        seeds: One per prompt, needed for sampling: name a prompt's seed by what identifies it (and the number
            of the sample), and its continuation is the same in any batch.
        rows: Most sequences of a batch.
        watch: Called with (prompt number, token) as tokens are made.
        between: Called before every step; may raise to end it all.

    Returns:
        One for each prompt, in order.

    Raises:
        ValueError: A prompt is empty, names an id that the model lacks, or leaves no room for
            `max_new_tokens`; seeds are missing or not one per prompt.
        FloatingPointError: The model's logits are not finite.
    """
    decoder = open_decoder(model)
    _check(decoder, prompts, max_new_tokens, stop, rows)
    if seeds is None:
        if not sampling.greedy and prompts:
            raise ValueError(f"temperature = {sampling.temperature}: sampling needs seeds, one per prompt")
        seeds = [0] * len(prompts)
    if len(seeds) != len(prompts):
        raise ValueError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one per prompt")
    made: list[Generated | None] = [None] * len(prompts)
    # Prompts of like length share a batch: less padding.
    order = sorted(range(len(prompts)), key=lambda number: len(prompts[number]))
    with evaluating(model):
        for start in range(0, len(order), rows):
            batch = [
                _Sequence(number, Chance(seeds[number]), [], []) for number in order[start : start + rows]
            ]
            _run(decoder, prompts, batch, max_new_tokens, frozenset(stop), sampling, watch, between)
            for sequence in batch:
                made[sequence.number] = sequence.result()
    return [one for one in made if one is not None]


def _run(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    batch: list[_Sequence],
    max_new_tokens: int,
    stop: frozenset[int],
    sampling: Sampling,
    watch: Watch | None,
    between: Callable[[], None] | None,
) -> None:
    """Carry the sequences of a batch to their ends."""
    unique: dict[tuple[int, ...], int] = {}
    places = [unique.setdefault(tuple(prompts[sequence.number]), len(unique)) for sequence in batch]
    if between is not None:
        between()
    logits = decoder.prefill(list(unique), max(map(len, unique)) + max_new_tokens)
    if len(unique) < len(batch):
        decoder.keep(places)
    logits = logits[places]  # a place for each sequence, in order
    active = batch
    for remaining in range(max_new_tokens - 1, -1, -1):
        tokens, logprobs = choose(logits, sampling, [sequence.chance for sequence in active])
        for sequence, token, logprob in zip(active, tokens, logprobs, strict=True):
            sequence.ids.append(token)
            sequence.logprobs.append(logprob)
            sequence.stopped = token in stop
            if watch is not None:
                watch(sequence.number, token)
        going = [row for row, sequence in enumerate(active) if not sequence.stopped]
        if not going or not remaining:
            return
        if len(going) < len(active):
            decoder.keep(going)
            active = [active[row] for row in going]
        if between is not None:
            between()
        logits = decoder.step([sequence.ids[-1] for sequence in active])


def _check(
    decoder: Decoder,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    stop: Collection[int],
    rows: int,
) -> None:
    if max_new_tokens < 1 or rows < 1:
        raise ValueError(f"max_new_tokens = {max_new_tokens} and rows = {rows}: both must be at least 1")
    for token in stop:
        if not 0 <= token < decoder.vocab_size:
            raise ValueError(f"stop id {token}: the model has ids 0 to {decoder.vocab_size - 1}")
    for number, prompt in enumerate(prompts):
        if not prompt:
            raise ValueError(f"prompt {number} is empty: give at least one token, such as BOS")
        if min(prompt) < 0 or max(prompt) >= decoder.vocab_size:
            wrong = next(token for token in prompt if not 0 <= token < decoder.vocab_size)
            raise ValueError(
                f"prompt {number} has id {wrong}; the model has ids 0 to {decoder.vocab_size - 1}"
            )
        if len(prompt) + max_new_tokens > decoder.context:
            raise ValueError(
                f"prompt {number} has {len(prompt)} tokens, which with max_new_tokens = {max_new_tokens} is "
                f"more than the {decoder.context} that the model can read; shorten one of them"
            )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Enter evaluation mode, without gradients; every module gets its own mode back afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode():
            yield
    finally:
        for module in training:
            module.training = True
