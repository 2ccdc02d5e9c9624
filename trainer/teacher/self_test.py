"""Before a teacher is believed: does it say the same twice, and do all its replicas say the same?

What is compared is the log-probability of the same tokens. The signal is how much it differs from token to
token: its standard deviation over the tokens of the test. What a student learns from is of that size, or a
few times smaller (the difference to its own log-probability), so noise that is a small share of it vanishes
in a batch and noise beside it does not.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.errors import TeacherError
from trainer.teacher.teacher import Teacher

NOISE = 0.05
"""Largest noise (root mean square of a difference) as a share of the signal."""
LEAST_SIGNAL = 1e-3
"""Nats. A teacher that knows no difference between tokens is held to a bound that rounding keeps."""
LEAST_TOKENS = 16
"""A spread over fewer tokens says nothing."""

Logprobs = NDArray[np.float64]
Say = Callable[[str], None]


@dataclass(frozen=True)
class SelfTest:
    """What a test found.

    Attributes:
        tokens: Tokens whose log-probabilities were compared.
        signal: Their standard deviation, nats.
        repeated: Root mean square difference between two times the same question.
        shuffled: And between the question alone and in a shuffled batch.
        replicas: Largest of such differences between two replicas; 0 with one.
    """

    tokens: int
    signal: float
    repeated: float
    shuffled: float
    replicas: float

    def document(self) -> dict[str, Any]:
        """Return it for a summary."""
        return {name: round(value, 9) for name, value in vars(self).items()}


def require_tokenizer(teacher: Teacher, tokenizer_sha256: str, vocab_size: int) -> None:
    """Refuse a teacher whose token ids are not those of the data.

    Args:
        teacher: The teacher.
        tokenizer_sha256: Of the tokenizer that the data were made with.
        vocab_size: Of the data.

    Raises:
        TeacherError: Its tokenizer or the size of its vocabulary is another.
    """
    if teacher.tokenizer_sha256 not in (None, tokenizer_sha256):
        raise TeacherError(
            f"the teacher's tokenizer is {teacher.tokenizer_sha256}, the data's is {tokenizer_sha256}: its "
            "log-probabilities are of other tokens; take a teacher that shares the student's token ids"
        )
    if teacher.vocab_size not in (None, vocab_size):
        raise TeacherError(
            f"the teacher has {teacher.vocab_size} token ids, the data have {vocab_size}: it was trained on "
            "another tokenizer; take a teacher that shares the student's token ids"
        )


def self_test(
    teacher: Teacher, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
) -> SelfTest:
    """Ask every replica of a teacher twice, and once in another order with other neighbours.

    Args:
        teacher: The teacher.
        sequences: A few real conversations.
        wanted: Positions of each; see `Teacher.score`.

    Returns:
        The differences found, all of them small enough.

    Raises:
        TeacherError: A replica contradicts itself or another by more than `NOISE` of the signal, both named
            with the numbers; or there are too few tokens to tell.
    """
    tokens = sum(map(len, wanted))
    if tokens < LEAST_TOKENS:
        raise TeacherError(
            f"a self-test of the teacher needs {LEAST_TOKENS} tokens at least, found {tokens}: give more "
            "conversations"
        )
    order = [*range(1, len(sequences), 2), *range(0, len(sequences), 2)][::-1]
    back = np.argsort(order)
    repeated = shuffled = 0.0
    said: dict[str, Logprobs] = {}
    for name, voice in teacher.voices():
        first = _flat(_ask(voice, sequences, wanted))
        again = [_ask(voice, [one], [at])[0] for one, at in zip(sequences, wanted, strict=True)]
        mixed = _ask(voice, [sequences[i] for i in order], [wanted[i] for i in order])
        signal = _signal(first)
        apart = rms(first - _flat(again)), rms(first - _flat([mixed[place] for place in back]))
        for noise, how in zip(apart, ("one by one", "in another order"), strict=True):
            require_same(noise, signal, f"{name} answered, and asked again {how}, answered")
        repeated, shuffled = max(repeated, apart[0]), max(shuffled, apart[1])
        said[name] = first
    replicas = 0.0
    names = list(said)
    for place, one in enumerate(names):
        for other in names[place + 1 :]:
            found = rms(said[one] - said[other])
            require_same(found, _signal(said[one]), f"replicas {one} and {other} answered")
            replicas = max(replicas, found)
    return SelfTest(tokens, _signal(said[names[0]]), repeated, shuffled, replicas)


def _ask(
    teacher: Teacher, sequences: Sequence[Sequence[int]], wanted: Sequence[Sequence[int]]
) -> list[Logprobs]:
    return [scores.label_logprob.astype(np.float64) for scores in teacher.score(sequences, wanted, topk=0)]


def _flat(parts: Sequence[Logprobs]) -> Logprobs:
    return np.concatenate(parts)


def rms(difference: Logprobs) -> float:
    """Return the root mean square of differences."""
    return float(np.sqrt(np.mean(difference**2)))


def _signal(logprobs: Logprobs) -> float:
    return max(float(logprobs.std()), LEAST_SIGNAL)


def require_same(noise: float, signal: float, who: str) -> None:
    """Refuse a teacher that contradicts itself, or another, by more than `NOISE` of the signal.

    Args:
        noise: Root mean square of the difference, nats.
        signal: What it is a share of, nats.
        who: Subject of the message, with its verb.

    Raises:
        TeacherError: It does.
    """
    if not noise <= NOISE * signal:
        raise TeacherError(
            f"{who} the same tokens with log-probabilities that differ by {noise:.3g} nats (root mean "
            "square), "
            f"{noise / signal:.1%} of their own spread of {signal:.3g}; at most {NOISE:.0%} can be learned "
            "from: serve the same weights everywhere, in a type that is wide enough, with prefix caching "
            "that "
            "is exact"
        )
