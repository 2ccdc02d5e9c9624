"""Format of a generated conversation: what follows a prompt's `<|start|>assistant`, read id by id.

An answer must be

    <|channel|> analysis <|message|> text <|end|>
    <|start|> assistant <|channel|> final <|message|> text <|return|>

where text is any number of ordinary ids: no special or reserved one. The reasoning may be empty, as it is in
training conversations that were cut to fit; an answer may not. Nothing follows `<|return|>`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum

from trainer.decoding.conversation import (
    ANALYSIS,
    ASSISTANT,
    CHANNEL,
    END,
    ENDOFTEXT,
    FINAL,
    FIRST_SPECIAL,
    MESSAGE,
    RETURN,
    START,
)

_HEADERS = ((CHANNEL, ANALYSIS, MESSAGE), (START, ASSISTANT, CHANNEL, FINAL, MESSAGE))
_TERMINATORS = (END, RETURN)
_PARTS = ("analysis", "final")


class Fault(StrEnum):
    """Why an answer is not valid."""

    ANALYSIS_HEADER = "analysis_header"
    FINAL_HEADER = "final_header"
    SPECIAL_IN_ANALYSIS = "special_in_analysis"
    SPECIAL_IN_FINAL = "special_in_final"
    EMPTY_FINAL = "empty_final"
    END_OF_TEXT = "end_of_text"
    UNFINISHED_ANALYSIS = "unfinished_analysis"
    UNFINISHED_FINAL = "unfinished_final"
    AFTER_RETURN = "after_return"


@dataclass(frozen=True)
class Validity:
    """Verdict on one answer.

    Attributes:
        fault: None for a valid one.
        position: Index of the offending id; the number of ids where something is missing at the end; None for
            a valid answer.
    """

    fault: Fault | None
    position: int | None

    @property
    def valid(self) -> bool:
        """Whether the answer has the required form."""
        return self.fault is None


class HarmonyAutomaton:
    """Reads an answer id by id.

    Attributes:
        complete: Whether the answer ended as it must.
        span: `analysis` or `final`: the message that is being read.
    """

    def __init__(self) -> None:
        self._part = 0
        self._header = 0  # ids of this message's header read so far
        self._text = 0
        self.complete = False

    @property
    def span(self) -> str:
        """The message that is being read."""
        return _PARTS[self._part]

    def feed(self, token: int) -> Fault | None:
        """Read one id; after a fault the automaton is of no more use."""
        if self.complete:
            return Fault.AFTER_RETURN
        if token == ENDOFTEXT:
            return Fault.END_OF_TEXT
        header = _HEADERS[self._part]
        if self._header < len(header):
            if token != header[self._header]:
                return (Fault.ANALYSIS_HEADER, Fault.FINAL_HEADER)[self._part]
            self._header += 1
        elif 0 <= token < FIRST_SPECIAL:
            self._text += 1
        elif token != _TERMINATORS[self._part]:
            return (Fault.SPECIAL_IN_ANALYSIS, Fault.SPECIAL_IN_FINAL)[self._part]
        elif self._part == 0:
            self._part, self._header, self._text = 1, 0, 0
        elif not self._text:
            return Fault.EMPTY_FINAL
        else:
            self.complete = True
        return None

    @property
    def unfinished(self) -> Fault | None:
        """The fault of ending here; None where the answer is complete."""
        if self.complete:
            return None
        return (Fault.UNFINISHED_ANALYSIS, Fault.UNFINISHED_FINAL)[self._part]


def check_answer(ids: Iterable[int]) -> Validity:
    """Judge a generated answer.

    Args:
        ids: What followed the prompt's `<|start|>assistant`, stop id included.
    """
    automaton, position = HarmonyAutomaton(), 0
    for token in ids:
        if (fault := automaton.feed(token)) is not None:
            return Validity(fault, position)
        position += 1
    fault = automaton.unfinished
    return Validity(fault, None if fault is None else position)
