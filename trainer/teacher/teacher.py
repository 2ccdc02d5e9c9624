"""What is asked of a teacher, and what it answers; `trainer.teacher.opening` opens one.

    teacher = open_teacher(path)
    scores = teacher.score([tokens], [range(110, 129)], topk=32)[0]
    scores.label_logprob                       # of tokens[111] to tokens[129]

Positions are label-aligned as in the data: what is said at position t is about token t + 1.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import numpy as np
from numpy.typing import NDArray

from trainer.errors import TeacherError


@dataclass(frozen=True)
class TeacherScores:
    """What a teacher says at the n wanted positions of one sequence, in their order.

    Attributes:
        label_logprob: float32 `[n]`, log-probability of the token that follows.
        ids: int32 `[n, K]`, the likeliest tokens, likeliest first; -1 where an adaptive K ended.
        logprobs: float32 `[n, K]`, of these; -inf where there is none.
        tail_mass: float32 `[n]`, probability of all other tokens; 1 where K = 0.
        draws: int32 `[n, M]`, tokens drawn from the tail by its probabilities, independently and with
            replacement; -1 where the tail has no mass.
    """

    label_logprob: NDArray[np.float32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_mass: NDArray[np.float32]
    draws: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.label_logprob)

    @classmethod
    def of_nothing(cls, topk: int, draws: int) -> Self:
        """Return the scores of no position."""
        return cls(
            np.empty(0, np.float32),
            np.empty((0, topk), np.int32),
            np.empty((0, topk), np.float32),
            np.empty(0, np.float32),
            np.empty((0, draws), np.int32),
        )


@dataclass(frozen=True)
class TailDraws:
    """Asks for tokens drawn from the tails.

    The draws at the i-th wanted position of a sequence are made from the sequence's key and i alone: in any
    batch, beside any others, they are the same, up to what rounding does to the distribution.

    Attributes:
        count: Draws at each position, M.
        keys: One of 128 bits for each sequence.
    """

    count: int
    keys: Sequence[int]


class Teacher(ABC):
    """Scores given token ids under a causal language model at temperature 1.

    Attributes:
        kind: Where the numbers come from.
        vocab_size: It has ids 0 to `vocab_size - 1`; None where nobody knows before it is asked.
        context: Longest sequence in tokens; None likewise.
        tokenizer_sha256: Digest of the tokenizer that its ids are of, the rank file's for o200k Harmony; None
            for one of our checkpoints, which reads the ids that it was trained on and has no tokenizer.
    """

    kind: ClassVar[str]
    vocab_size: int | None = None
    context: int | None = None
    tokenizer_sha256: str | None = None

    def score(
        self,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        *,
        mass: float | None = None,
        tail: TailDraws | None = None,
    ) -> list[TeacherScores]:
        """Score sequences; what they begin with in common is computed once where the teacher can.

        How many are given at once, and which, changes results by round-off at most; the same call gives the
        same bits on a local teacher.

        Args:
            sequences: Token ids, each at least two.
            wanted: For each sequence the positions that are asked for, rising, none the last: such as
                `range(prompt - 1, len(sequence) - 1)` for all that follows a prompt. May be empty.
            topk: How many of the likeliest tokens are listed, K; 0 for label log-probabilities alone.
            mass: List only as many of them as have this probability together, at least one.
            tail: Draw from the tails too.

        Returns:
            One for each sequence, in order.

        Raises:
            TeacherError: An id, a position or a length that the teacher cannot serve, something asked for
                that this kind of teacher cannot do, or no usable answer.
        """
        self._check(sequences, wanted, topk, mass, tail)
        return self._score(sequences, wanted, topk, mass, tail)

    @abstractmethod
    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        tail: TailDraws | None,
    ) -> list[TeacherScores]:
        """Score what `score` has found to be askable."""

    @abstractmethod
    def identity(self) -> dict[str, Any]:
        """Return what the teacher says of itself, JSON values without a path, host or time."""

    def voices(self) -> "list[tuple[str, Teacher]]":
        """Return everyone who answers, by name: a served teacher's replicas one by one."""
        return [(self.kind, self)]

    def give_up(self) -> None:  # noqa: B027 - a local teacher's call is short
        """Ask nobody anything more: what another thread is asking for ends soon, with a `TeacherError`."""

    def close(self) -> None:  # noqa: B027 - not every teacher has something to close
        """Let go of connections and files; a local teacher has none."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _check(
        self,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        tail: TailDraws | None,
    ) -> None:
        if len(wanted) != len(sequences):
            raise TeacherError(
                f"{len(wanted)} lists of positions for {len(sequences)} sequences: one for each"
            )
        if topk < 0 or (self.vocab_size is not None and topk > self.vocab_size):
            raise TeacherError(f"topk = {topk}: allowed are 0 to the vocabulary's {self.vocab_size}")
        if mass is not None and not (0 < mass <= 1 and topk):
            raise TeacherError(f"mass = {mass} with topk = {topk}: a mass is in (0, 1], and needs topk ≥ 1")
        if tail is not None and (tail.count < 1 or len(tail.keys) != len(sequences)):
            raise TeacherError(
                f"tail: {tail.count} draws with {len(tail.keys)} keys for {len(sequences)} sequences: at "
                "least one draw, and a key for each sequence"
            )
        for number, (tokens, positions) in enumerate(zip(sequences, wanted, strict=True)):
            self._check_sequence(number, tokens, positions)

    def _check_sequence(self, number: int, tokens: Sequence[int], positions: Sequence[int]) -> None:
        ids = np.asarray(tokens, dtype=np.int64)
        if len(ids) < 2:
            raise TeacherError(f"sequence {number} has {len(ids)} tokens: at least 2, nothing follows one")
        if self.context is not None and len(ids) > self.context:
            raise TeacherError(
                f"sequence {number} has {len(ids)} tokens; the teacher reads {self.context}: score less"
            )
        if ids.min() < 0 or (self.vocab_size is not None and ids.max() >= self.vocab_size):
            wrong = ids[(ids < 0) | (ids >= (self.vocab_size or np.inf))][0]
            known = "0 and more" if self.vocab_size is None else f"0 to {self.vocab_size - 1}"
            raise TeacherError(
                f"sequence {number} has token id {wrong}; the teacher has ids {known}: it reads another "
                "tokenizer's ids"
            )
        at = np.asarray(positions, dtype=np.int64)
        if len(at) and (at[0] < 0 or at[-1] > len(ids) - 2 or (np.diff(at) <= 0).any()):
            raise TeacherError(
                f"sequence {number}: wanted positions must rise from 0 at least to {len(ids) - 2} at most, "
                f"where the last token is foretold; found {at[:3].tolist()} to {at[-1]}"
            )
