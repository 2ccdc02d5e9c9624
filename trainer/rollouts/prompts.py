"""The walk over the prompts: each conversation of the train split once an epoch, in a seeded order.

A prompt is a stored conversation up to the beginning of its answer, with another reasoning mode in its system
message where the curriculum asks for one. The place is two integers and how many of the present prompt's
answers were asked for; what a place means follows from data and seed.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.rng import permutation, stream
from trainer.errors import DataError
from trainer.rollouts.chance import draw
from trainer.rollouts.curriculum import Phase, mode_of, phase_of
from trainer.rollouts.rollout import Request

PromptOf = Callable[[int, str], NDArray[np.int32]]
"""From a document's number and a reasoning mode to the prompt's ids [P] int32."""


@dataclass(frozen=True)
class Prompts:
    """What there is to ask.

    Attributes:
        count: Conversations.
        prompt: Makes the prompt of one of them.
        identity: Digest of what the numbers mean: the documents, and their order.
    """

    count: int
    prompt: PromptOf
    identity: str


class PromptWalk:
    """Hands out requests, as many as a round takes.

    Attributes:
        epoch: Of the next prompt.
        index: Its place in that epoch's order.
        asked: Answers of it that were asked for already.
        wanted: How many it gets in all; 0 until it is begun.
        skipped: Prompts left out since the beginning, because an answer would not fit behind them.
    """

    def __init__(
        self, prompts: Prompts, curriculum: Sequence[Phase], *, seed: int, steps: int, longest: int
    ) -> None:
        """Stand before the first prompt.

        Args:
            prompts: What there is to ask.
            curriculum: Phases of the run.
            seed: The experiment's seed.
            steps: Of the run.
            longest: Most tokens of a prompt; a longer one is skipped and counted.
        """
        self._prompts, self._curriculum = prompts, curriculum
        self._seed, self._steps, self._longest = seed, steps, longest
        self.epoch = self.index = self.asked = self.wanted = self.skipped = 0
        self._mode = ""
        self._order = lru_cache(maxsize=2)(
            lambda epoch: permutation(stream(draw("order", seed), epoch), prompts.count)
        )

    def take(self, number: int, count: int) -> list[Request]:
        """Ask for the answers of a round.

        Args:
            number: Of the round.
            count: How many.

        Raises:
            DataError: A whole epoch has no prompt that is short enough.
        """
        phase = phase_of(self._curriculum, number, self._steps)
        found: list[Request] = []
        passed = 0
        while len(found) < count:
            if self.index == self._prompts.count:
                self.epoch, self.index = self.epoch + 1, 0
            document = int(self._order(self.epoch)[self.index])
            if not self.wanted:
                self._mode = mode_of(phase, self._seed, self.epoch, document)
            prompt = self._prompts.prompt(document, self._mode)
            if len(prompt) > self._longest:
                self.skipped += 1
                self.index += 1
                passed += 1
                if passed > self._prompts.count:
                    raise DataError(
                        f"none of the {self._prompts.count} conversations has a prompt of at most "
                        f"{self._longest} tokens (seq_len - rollouts.max_new_tokens); raise seq_len or lower "
                        "max_new_tokens"
                    )
                continue
            passed = 0
            self.wanted = self.wanted or phase.rollouts
            found.append(Request(self.epoch, document, self.asked, self._mode, prompt))
            self.asked += 1
            if self.asked == self.wanted:
                self.index += 1
                self.asked = self.wanted = 0
        return found

    def state_dict(self) -> dict[str, Any]:
        """Return the place."""
        return {
            "epoch": self.epoch,
            "index": self.index,
            "asked": self.asked,
            "wanted": self.wanted,
            "mode": self._mode if self.wanted else "",
            "skipped": self.skipped,
            "identity": self._prompts.identity,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place.

        Raises:
            DataError: It belongs to other prompts, or lies outside them.
        """
        if state["identity"] != self._prompts.identity:
            raise DataError(
                f"the checkpoint walks over prompts {state['identity']}, this data gives "
                f"{self._prompts.identity}: the data set or the seed changed. Resume with those of the "
                "checkpoint, or start a new run"
            )
        if not 0 <= state["index"] <= self._prompts.count:
            raise DataError(
                f"the checkpoint stands at prompt {state['index']} of {self._prompts.count} in an epoch"
            )
        self.epoch, self.index = int(state["epoch"]), int(state["index"])
        self.asked, self.wanted = int(state["asked"]), int(state["wanted"])
        self.skipped, self._mode = int(state["skipped"]), str(state["mode"])


def identity_of(documents_sha256: str, seed: int) -> str:
    """Return the identity of an order of prompts: its documents and its seed."""
    return hashlib.sha256(f"prompts/1 {documents_sha256} {seed}".encode("ascii")).hexdigest()


def seed_of(seed: int, request: Request, number: int) -> int:
    """Return the seed of an answer: of what was asked and its round, never of time or batch.

    Args:
        seed: The experiment's.
        request: What was asked.
        number: Of the round.
    """
    return draw("answer", seed, request.epoch, request.document, request.sample, number)
