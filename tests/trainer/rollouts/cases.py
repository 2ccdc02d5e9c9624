"""Prompts, answers and a teacher by formula: what the tests of rollouts share."""

import hashlib
import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from trainer.errors import TeacherError
from trainer.rollouts.forms import SPAN_FINAL, SPAN_REASONING
from trainer.rollouts.prompts import Prompts, identity_of
from trainer.rollouts.rollout import Request, Rollout, Score
from trainer.teacher.teacher import Teacher, TeacherScores

VOCAB, EOD, STOP, MIDDLE = 256, 255, 254, 253


class TinyForm:
    """Reasoning up to the token 253, the answer up to 254."""

    stop = (STOP,)
    end = STOP

    def spans(self, ids):
        after = np.cumsum([token == MIDDLE for token in ids]) - [token == MIDDLE for token in ids]
        return np.where(after > 0, SPAN_FINAL, SPAN_REASONING).astype(np.int64)

    def valid(self, ids):
        return list(ids).count(MIDDLE) == 1 and ids[-1] == STOP

    def control(self, ids):
        return ids >= MIDDLE


def tiny_prompts(count=10, longest=12):
    """Conversation n has a prompt of 2 + n % longest tokens; the mode is its first token."""

    def prompt(document, mode):
        body = (7 * document + 3 * np.arange(1 + document % longest)) % 200
        return np.array([len(mode), *body], dtype=np.int32)

    return Prompts(count, prompt, identity_of(f"tiny-{count}", 0))


@dataclass
class Phase:
    until: float = 1.0
    low: float = 0.0
    medium: float = 1.0
    high: float = 0.0
    rollouts: int = 1


class FormulaTeacher(Teacher):
    """Log-probabilities by a hash of the sequence, so that an answer given to another question shows."""

    kind: ClassVar[str] = "formula"
    vocab_size = VOCAB

    def __init__(
        self, *, gate: threading.Event | None = None, hold_after: int = 0, fail_after: int | None = None
    ) -> None:
        self.gate, self.hold_after, self.fail_after = gate, hold_after, fail_after
        self.asked: list[list[int]] = []

    def _score(self, sequences, wanted, topk, mass, tail):
        if self.gate is not None and len(self.asked) >= self.hold_after:
            assert self.gate.wait(20)
        if self.fail_after is not None and len(self.asked) >= self.fail_after:
            raise TeacherError("the teacher has gone home; start it again")
        self.asked += [list(map(int, sequence)) for sequence in sequences]
        return [one(sequence, list(at), topk) for sequence, at in zip(sequences, wanted, strict=True)]

    def identity(self) -> dict[str, Any]:
        return {"kind": self.kind}


def one(sequence: Sequence[int], wanted: list[int], topk: int) -> TeacherScores:
    digest = hashlib.sha256(str(list(map(int, sequence))).encode()).digest()
    rng = np.random.default_rng(int.from_bytes(digest[:8], "big"))
    n = len(wanted)
    logprobs = -np.sort(rng.exponential(size=(n, topk)), axis=1) - 3.0
    return TeacherScores(
        (-rng.exponential(size=n)).astype(np.float32),
        rng.permuted(np.tile(np.arange(VOCAB), (n, 1)), axis=1)[:, :topk].astype(np.int32),
        logprobs.astype(np.float32),
        (1.0 - np.exp(logprobs).sum(axis=1)).astype(np.float32),
        np.zeros((n, 0), np.int32),
    )


def rollout(number=1, born=0, prompt=3, answer=4, document=0, mode="medium", topk=0, scored=True, seed=0):
    rng = np.random.default_rng([number, document, seed])
    request = Request(0, document, 0, mode, rng.integers(0, 200, prompt).astype(np.int32))
    ids = rng.integers(0, 200, answer).astype(np.int32)
    made = Rollout(request, number, born, ids, -rng.random(answer, dtype=np.float32), bool(number % 2))
    if not scored:
        return made
    score = Score(
        -rng.random(answer, dtype=np.float32),
        rng.integers(0, 200, (answer, topk)).astype(np.int32),
        -rng.random((answer, topk), dtype=np.float32),
        rng.random(answer, dtype=np.float32),
    )
    return made.scored(score)
