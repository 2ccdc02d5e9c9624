"""Generation: prompts in, token ids and their log-probabilities out, for our models and for `transformers`'.

from trainer.decoding.generation import generate
from trainer.decoding.sampling import Sampling

for made in generate(model, prompts, max_new_tokens=64, stop=(200002, 200012),
                     sampling=Sampling(temperature=1.0), seeds=range(len(prompts))):
    made.ids, made.logprobs, made.finish
"""

from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import nn

from trainer.decoding.decoder import Decoder, open_decoder
from trainer.decoding.sampling import GREEDY, Chance, Sampling, choose
from trainer.decoding.slots import slots_of
from trainer.model.gpt import VPGPTModel

Watch = Callable[[int, int], None]

LOOK_EVERY = 8
"""Steps of slots between two looks at them: a sequence that ends runs on for a few, unread."""
FREE_SHARE = 8
"""Part of the slots, one in so many, that is free before prompts are taken into a batch under way."""
PREFILL_TOKENS = 1 << 15
"""Most tokens of prompts, padding included, that run in one pass into slots."""


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

    Where the model's backend says so, sequences run in static slots (`trainer.decoding.slots`): the host
    hears of tokens every few steps, and a place whose sequence has ended is given to the next prompt.

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
        watch: Called with (prompt number, token) as tokens are made; those of a sequence in order.
        between: Called before every step, in slots before every few; may raise to end it all.

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
    if isinstance(model, VPGPTModel) and model.backend.slots and order:
        with evaluating(model):
            run = _SlotRun(
                model,
                prompts,
                order,
                seeds,
                max_new_tokens=max_new_tokens,
                stop=frozenset(stop),
                sampling=sampling,
                rows=rows,
                watch=watch,
            )
            return run.run(between)
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


class _SlotRun:
    """Carries sequences to their ends in slots, as many as `rows` says or a power of two that suffices.

    Attributes:
        held: Which prompt is in a slot.
        known: Tokens that its sequence was known to have made when it was looked at last.
    """

    def __init__(
        self,
        model: VPGPTModel,
        prompts: Sequence[Sequence[int]],
        order: Sequence[int],
        seeds: Sequence[int],
        *,
        max_new_tokens: int,
        stop: frozenset[int],
        sampling: Sampling,
        rows: int,
        watch: Watch | None,
    ) -> None:
        self._prompts, self._seeds, self._limit, self._stop = prompts, seeds, max_new_tokens, stop
        self._sampling, self._watch = sampling, watch
        self._slots = slots_of(
            model,
            count=min(rows, 1 << (len(prompts) - 1).bit_length()),
            capacity=max(map(len, prompts)) + max_new_tokens,
            room=max_new_tokens,
            sampling=sampling,
        )
        self._slots.begin(stop, max_new_tokens)
        self._waiting = deque(order)
        self._made: list[Generated | None] = [None] * len(prompts)
        self.held: dict[int, int] = {}
        self.known: dict[int, int] = {}

    def run(self, between: Callable[[], None] | None) -> list[Generated]:
        while self._waiting or self.held:
            if between is not None:
                between()
            self._admit()
            left = self._limit - min(self.known[slot] for slot in self.held)
            self._slots.step(min(LOOK_EVERY, left))
            self._look()
        return [one for one in self._made if one is not None]

    def _admit(self) -> None:
        """Give free places to those who wait; a few at once, as their pass costs as much as several steps."""
        count = self._slots.count
        free = [slot for slot in range(count) if slot not in self.held][: len(self._waiting)]
        if not free or (self.held and len(free) < min(len(self._waiting), max(1, count // FREE_SHARE))):
            return
        while free:
            size = _prefix_within(PREFILL_TOKENS, [len(self._prompts[number]) for number in self._waiting])
            places, free = free[:size], free[size:]
            numbers = [self._waiting.popleft() for _ in places]
            draws = None
            if not self._sampling.greedy:
                draws = np.stack([Chance(self._seeds[number]).draws(self._limit) for number in numbers])
            self._slots.admit(places, [self._prompts[number] for number in numbers], draws)
            self.held |= dict(zip(places, numbers, strict=True))
            self.known |= dict.fromkeys(places, 0)

    def _look(self) -> None:
        """Tell of new tokens where someone watches, and take what is complete out of its place."""
        progress = self._slots.progress()
        ended = [slot for slot in self.held if not progress.running[slot]]
        wanted = ended if self._watch is None else list(self.held)
        if wanted:
            ids, logprobs = self._slots.tokens(wanted, int(progress.made[wanted].max()))
            for slot, of_slot, theirs in zip(wanted, ids, logprobs, strict=True):
                number, length = self.held[slot], int(progress.made[slot])
                if self._watch is not None:
                    for token in of_slot[self.known[slot] : length].tolist():
                        self._watch(number, token)
                if slot in ended:
                    own: list[int] = of_slot[:length].tolist()
                    finish: Literal["stop", "length"] = "stop" if own[-1] in self._stop else "length"
                    self._made[number] = Generated(tuple(own), tuple(theirs[:length].tolist()), finish)
        for slot in ended:
            del self.held[slot]
        self.known = {slot: int(progress.made[slot]) for slot in self.held}


def _prefix_within(most: int, lengths: Sequence[int]) -> int:
    """Return how many of the first rows, at least one, fit into a pass when padded to the longest of them."""
    width = 0
    for size, length in enumerate(lengths):
        width = max(width, length)
        if size and width * (size + 1) > most:
            return size
    return len(lengths)


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
