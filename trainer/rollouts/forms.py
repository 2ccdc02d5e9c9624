"""The form of an answer: which sampled token is reasoning, which is final, which is a control token.

A well-formed answer is one that `trainer.decoding.answers` lets pass. Every sampled token trains, those of a
malformed answer too: a model that only heard about its well-formed answers would never be told what the
teacher thinks of the others. Where an answer breaks the form, all that follows counts to the message that was
being read; how many do so is logged.
"""

from collections.abc import Collection, Sequence
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from trainer.decoding.answers import HarmonyAutomaton, check_answer
from trainer.decoding.conversation import ENDOFTEXT, FIRST_SPECIAL, STOP_IDS

SPAN_REASONING, SPAN_FINAL = 6, 7
"""Spans of sampled tokens; see `trainer.contract.kinds`."""


class Form(Protocol):
    """What answers look like.

    Attributes:
        stop: Ids that end one.
        end: The id that ends a finished one.
    """

    @property
    def stop(self) -> Collection[int]: ...  # noqa: D102
    @property
    def end(self) -> int: ...  # noqa: D102

    def spans(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Return the span of each sampled id [n]."""

    def valid(self, ids: Sequence[int]) -> bool:
        """Whether an answer has the form."""

    def control(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which ids are control tokens [n]."""


class HarmonyForm:
    """Reasoning in the analysis channel, then the answer in the final one."""

    stop = (*STOP_IDS, ENDOFTEXT)
    end = STOP_IDS[0]

    def spans(self, ids: Sequence[int]) -> NDArray[np.int64]:
        """Span of the message that each id belongs to, wrapper and terminator included."""
        automaton = HarmonyAutomaton()
        found = np.empty(len(ids), dtype=np.int64)
        for place, token in enumerate(ids):
            found[place] = SPAN_REASONING if automaton.span == "analysis" else SPAN_FINAL
            if automaton.feed(token) is not None:
                found[place:] = found[place]
                break
        return found

    def valid(self, ids: Sequence[int]) -> bool:
        """Whether the automaton accepts an answer."""
        return check_answer(ids).valid

    def control(self, ids: NDArray[np.int32]) -> NDArray[np.bool_]:
        """Return which ids are special or reserved: text encodes to none of them."""
        return ids >= FIRST_SPECIAL
