"""Decoding in static slots: a batch of fixed size whose places are taken by one sequence after another.

Everything that a step reads and writes stays on the device and where it is: the next token of every slot,
its position, keys and values, the random numbers of its sequence, what it has made so far, and whether it
still runs. So a step asks the host nothing, and where the backend allows it, it is one CUDA graph. The host
looks at the flags every few steps, takes away what is complete and puts further prompts into the places. A
slot without a sequence goes along as padding: it meets no expert, and nobody reads what it makes.

    slots = slots_of(model, count=64, capacity=1024, room=512, sampling=GREEDY)
    slots.begin(stop, limit=256)
    slots.admit([0, 1], prompts, draws)
    slots.step(8)
    slots.progress()
"""

import logging
import weakref
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from trainer.decoding.cache import DecodingCache, head_logits, next_logits
from trainer.decoding.decoder import refuse_spread_experts
from trainer.decoding.sampling import Sampling, not_finite, pick
from trainer.decoding.slot_cache import SlotCache
from trainer.decoding.step import Step, obstacle
from trainer.model.document_mask import PADDING
from trainer.model.gpt import VPGPTModel

LOGGER = logging.getLogger(__name__)

_ROUND = 256
"""Capacity and room are multiples of it, so that tensors and graph serve the next call too."""
_WARM_UP = 2
"""Steps before a capture: kernels compile and libraries set up in the first."""
_KEPT: weakref.WeakKeyDictionary[VPGPTModel, "Slots"] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Progress:
    """Where the slots are.

    Attributes:
        running: Slots whose sequence goes on.
        made: Tokens that each slot's sequence has made.
    """

    running: NDArray[np.bool_]
    made: NDArray[np.int64]


class Slots:
    """A batch of slots, and the step that takes all of them one token further.

    Used in evaluation mode and without gradients, `trainer.decoding.generation.evaluating`.

    Args:
        model: In any tensor-parallel layout.
        count: Slots.
        capacity: Tokens of the longest sequence, prompt included.
        room: Most tokens that a sequence may make.
        sampling: How the next token is chosen.

    Raises:
        NotImplementedError: Experts are spread over ranks.
    """

    def __init__(
        self, model: VPGPTModel, *, count: int, capacity: int, room: int, sampling: Sampling
    ) -> None:
        refuse_spread_experts(model)
        device = model.head_weight.device
        self._model = weakref.ref(model)  # the model may keep its slots
        self.count, self.room, self.sampling = count, room, sampling
        self.cache = SlotCache(model, count, capacity)
        self._tokens = torch.zeros(count, dtype=torch.int64, device=device)
        self._running = torch.zeros(count, dtype=torch.bool, device=device)
        self._made = torch.zeros(count, dtype=torch.int64, device=device)
        self._faulty = torch.zeros(count, dtype=torch.bool, device=device)
        self._limit = torch.ones((), dtype=torch.int64, device=device)
        self._stops = torch.zeros(model.vocab_size, dtype=torch.bool, device=device)
        self._draws = torch.zeros(count, room, dtype=torch.float64, device=device)
        self._ids = torch.zeros(count, room, dtype=torch.int64, device=device)
        self._logprobs = torch.zeros(count, room, dtype=torch.float32, device=device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._weights = addresses(model)
        on_card = device.type == "cuda" and model.backend.capturable
        self._wanted = on_card and model.pg_collection.tp.size() == 1
        self._short: Step | None = None
        if on_card:
            if (reason := obstacle(model, count)) is None:
                self._short = Step(model, self.cache)
            else:
                LOGGER.info("decoding runs the model operation by operation: %s", reason)

    @property
    def model(self) -> VPGPTModel:
        """Whose slots they are."""
        model = self._model()
        assert model is not None, "slots are used while their model lives"
        return model

    def serves(self, *, count: int, capacity: int, room: int, sampling: Sampling) -> bool:
        """Whether these slots do what others with these arguments would, to the same bits."""
        return (
            (self.count, self.sampling) == (count, sampling)
            and self.cache.capacity >= capacity
            and self.room >= room
            and self._weights == addresses(self.model)
        )

    def begin(self, stop: Collection[int], limit: int) -> None:
        """Empty the slots, and say when sequences end.

        Args:
            stop: Ids that end one.
            limit: Most tokens that one makes, at most `room`.
        """
        if self._short is not None:
            self._short.refresh()
        self._running.zero_()
        self._faulty.zero_()
        self._made.zero_()
        self._limit.fill_(limit)
        self._stops.zero_()
        self._stops[torch.tensor(sorted(stop), dtype=torch.int64, device=self._stops.device)] = True

    def admit(
        self, slots: Sequence[int], prompts: Sequence[Sequence[int]], draws: NDArray[np.float64] | None
    ) -> None:
        """Put prompts into slots and make the first token of each. Equal prompts are run once.

        Args:
            slots: Places, each once; what they held is gone.
            prompts: Token ids, one prompt a place.
            draws: fp64 `[n, limit]`, the random numbers of each sequence; None when greedy.
        """
        device = self._tokens.device
        unique: dict[tuple[int, ...], int] = {}
        rows = torch.tensor([unique.setdefault(tuple(prompt), len(unique)) for prompt in prompts])
        places, rows = torch.tensor(slots).to(device), rows.to(device)
        width = max(map(len, unique))
        tokens = torch.tensor([[*prompt, *[0] * (width - len(prompt))] for prompt in unique])
        cache = DecodingCache(len(unique))
        logits = next_logits(self.model, cache, tokens.to(device), [len(prompt) for prompt in unique])
        self.cache.fill(places, cache, rows)
        drawn = self._draws.new_zeros(len(slots))
        if draws is not None:
            numbers = torch.from_numpy(draws).to(device)
            self._draws[places, : numbers.shape[1]] = numbers
            drawn = numbers[:, 0]
        chosen, logprobs = pick(logits[rows], self.sampling, drawn)
        self._ids[places, 0], self._logprobs[places, 0] = chosen, logprobs
        self._tokens[places] = chosen
        self._made[places] = 1
        self._faulty[places] = ~logprobs.isfinite()
        self._running[places] = ~self._stops[chosen] & (self._limit > 1)

    def step(self, count: int) -> None:
        """Take all running sequences up to `count` tokens further; returns before the device has done it."""
        if self._wanted and self._graph is None:
            self._capture()
        for _ in range(count):
            if self._graph is None:
                self._step()
            else:
                self._graph.replay()

    def progress(self) -> Progress:
        """Wait for the device, and look where the slots are.

        Raises:
            FloatingPointError: The logits of a sequence are not finite.
        """
        flags = torch.stack((self._running.long(), self._made, self._faulty.long())).cpu().numpy()
        if flags[2].any():
            raise not_finite(int(np.flatnonzero(flags[2])[0]))
        return Progress(flags[0].astype(bool), flags[1])

    def tokens(self, slots: Sequence[int], longest: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Return the first `longest` ids `[n, longest]` that some slots have made, and their logarithms."""
        places = torch.tensor(slots).to(self._ids.device)
        ids, logprobs = (part[places, :longest].cpu().numpy() for part in (self._ids, self._logprobs))
        return ids, logprobs

    def _step(self) -> None:
        """One token; a function of tensors alone, and writing to tensors alone."""
        running = self._running
        hidden = self._hidden()
        place = self._made.clamp(max=self.room - 1)[:, None]  # a slot that stands still may be at its end
        drawn = self._draws.gather(1, place)[:, 0]
        chosen, logprobs = pick(head_logits(self.model, hidden), self.sampling, drawn)
        for kept, new in ((self._ids, chosen), (self._logprobs, logprobs)):
            kept.scatter_(1, place, torch.where(running, new, kept.gather(1, place)[:, 0])[:, None])
        self._tokens.copy_(torch.where(running, chosen, self._tokens))
        self._faulty |= running & ~logprobs.isfinite()
        self._made += running
        self.cache.positions += running
        running &= ~self._stops[chosen] & (self._made < self._limit)

    def _hidden(self) -> torch.Tensor:
        """Run the slots' tokens, keeping their keys and values; final hidden states `[B, H]`."""
        if self._short is not None:
            return self._short(self._tokens, self._running)
        doc_id = torch.where(self._running, 0, PADDING)[:, None]
        positions = self.cache.positions[:, None]
        return self.model.forward_hidden(self._tokens[:, None], positions, doc_id, self.cache)[0]

    def _capture(self) -> None:
        """Record a step, with every slot standing still."""
        LOGGER.info("capturing a CUDA graph of a decoding step of %d slots", self.count)
        running = self._running.clone()
        self._running.zero_()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                self._step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self._step()
        self._running.copy_(running)
        self._graph = graph


def slots_of(model: VPGPTModel, *, count: int, capacity: int, room: int, sampling: Sampling) -> Slots:
    """Return slots for a model: those that it was given last where they serve, as a graph takes a while.

    They live as long as the model does, and are thrown away when others are asked for.

    Args:
        model: See `Slots`.
        count: Slots.
        capacity: Tokens of the longest sequence.
        room: Most tokens that one makes.
        sampling: How the next token is chosen.
    """
    kept = _KEPT.get(model)
    if kept is None or not kept.serves(count=count, capacity=capacity, room=room, sampling=sampling):
        forget_slots(model)
        del kept  # its memory goes before the new one's comes
        capacity = min(_rounded(capacity), model.max_sequence_length)
        kept = Slots(model, count=count, capacity=capacity, room=_rounded(room), sampling=sampling)
        _KEPT[model] = kept
    return kept


def forget_slots(model: VPGPTModel) -> None:
    """Let go of a model's slots and their memory."""
    _KEPT.pop(model, None)


def addresses(model: VPGPTModel) -> tuple[int, ...]:
    """Where the weights are: a graph knows them by nothing else."""
    return tuple(parameter.data_ptr() for parameter in model.parameters())


def _rounded(length: int) -> int:
    return -(-length // _ROUND) * _ROUND
