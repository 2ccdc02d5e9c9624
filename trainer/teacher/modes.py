"""Reasoning modes: the same completion behind a system message that asks for another effort.

The mode of a conversation is a line of its system message, `Reasoning: high`. A teacher is asked in another
mode by writing that line anew; all that follows the system message, the question (cut or not) and the
completion, keeps its token ids, so a position of the stored conversation and one of the other differ by the
same number everywhere behind the system message.

    other = ModeWriter(tokenizer).rewrite(tokens, "medium")
    scores = teacher.score([other.tokens], [other.positions(wanted)], topk=32)
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.checkpoints.tokenizers import Tokenizer
from trainer.contract.scaffold import EFFORTS
from trainer.decoding.conversation import END, FIRST_SPECIAL, MESSAGE, START, speaks_harmony
from trainer.errors import TeacherError

MODES = tuple(effort.lower() for effort in EFFORTS)
_LINE = re.compile(rf"^Reasoning: ({'|'.join(MODES)})$", re.MULTILINE)


@dataclass(frozen=True)
class Rewritten:
    """A conversation in another mode.

    Attributes:
        tokens: int32 `[N']`, its ids.
        shift: What is at position p of the stored conversation is at p + shift here.
        first: First stored position that has a place here: the end of the system message.
    """

    tokens: NDArray[np.int32]
    shift: int
    first: int

    def positions(self, stored: Sequence[int] | NDArray[np.int64]) -> NDArray[np.int64]:
        """Map positions of the stored conversation.

        Args:
            stored: `[n]`; label-aligned ones stay so, for a position and the token after it move alike.

        Returns:
            int64 `[n]`.

        Raises:
            TeacherError: One of them lies in the system message, which is another here.
        """
        at = np.asarray(stored, dtype=np.int64)
        if len(at) and at.min() < self.first:
            raise TeacherError(
                f"position {at.min()} lies in the system message, which ends at {self.first} and is another "
                "in "
                "another mode: only what follows it can be scored"
            )
        return at + self.shift


class ModeWriter:
    """Reads and writes the mode of conversations as token ids.

    Args:
        tokenizer: With Harmony's control tokens.

    Raises:
        TeacherError: It has none.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        if not speaks_harmony(tokenizer):
            raise TeacherError("reasoning modes need a tokenizer with Harmony's control tokens: give o200k's")
        self._tokenizer = tokenizer
        self._opening = [START, *tokenizer.encode("system"), MESSAGE]
        self._known: dict[tuple[tuple[int, ...], str], list[int]] = {}

    def mode(self, tokens: Sequence[int] | NDArray[np.int32]) -> str:
        """Return the mode that a conversation's system message asks for.

        Raises:
            TeacherError: It has no system message, or one that does not say exactly one mode.
        """
        text = self._text(self._system(tokens))
        return self._found(text).group(1)

    def rewrite(self, tokens: Sequence[int] | NDArray[np.int32], mode: str) -> Rewritten:
        """Write a conversation's mode anew.

        Args:
            tokens: Ids of a conversation or of its beginning, the whole system message at least.
            mode: `low`, `medium` or `high`.

        Raises:
            TeacherError: An unknown mode; a system message that is missing, says no mode or several, or is
                not what its own text encodes to.
        """
        if mode not in MODES:
            raise TeacherError(f"reasoning mode {mode!r}: allowed are {', '.join(MODES)}")
        system = self._system(tokens)
        other = self._known.get((system, mode))
        if other is None:
            text = self._text(system)
            found = self._found(text)
            other = self._tokenizer.encode(text[: found.start(1)] + mode + text[found.end(1) :])
            self._known[system, mode] = other
        begin = len(self._opening)
        end = begin + len(system)
        ids = np.asarray(tokens, dtype=np.int32)
        return Rewritten(
            np.concatenate((ids[:begin], np.array(other, dtype=np.int32), ids[end:])),
            len(other) - len(system),
            end,
        )

    def _system(self, tokens: Sequence[int] | NDArray[np.int32]) -> tuple[int, ...]:
        """Return the ids of the system message's content."""
        ids = np.asarray(tokens, dtype=np.int64)
        begin = len(self._opening)
        if ids[:begin].tolist() != self._opening:
            raise TeacherError(
                f"the conversation begins with {ids[:begin].tolist()}, not with a system message "
                f"({self._opening}): it has no reasoning mode, so it can be scored in the stored one only"
            )
        ends = np.flatnonzero(ids[begin:] >= FIRST_SPECIAL)
        if not len(ends) or ids[begin + ends[0]] != END:
            raise TeacherError(f"the system message of {len(ids)} tokens has no end: give the whole message")
        return tuple(ids[begin : begin + ends[0]].tolist())

    def _text(self, system: tuple[int, ...]) -> str:
        text = self._tokenizer.decode(system)
        if tuple(self._tokenizer.encode(text)) != system:
            raise TeacherError(
                "the system message is not what its own text encodes to, so another mode would change more "
                "than the mode: render the data with the tokenizer's own encoding"
            )
        return text

    def _found(self, text: str) -> re.Match[str]:
        found = list(_LINE.finditer(text))
        if len(found) != 1:
            raise TeacherError(
                f"the system message has {len(found)} lines `Reasoning: …` with one of {', '.join(MODES)}; "
                "exactly one says the mode"
            )
        return found[0]
