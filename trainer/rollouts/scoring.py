"""The teacher at work beside the student: a thread that scores one round after the other.

A round's scores are there as a whole or not at all. When they are there decides nothing but how long a step
waits for them: which round a step uses is the clock's business. An error of the teacher comes up where its
round is asked for, and ends the run.
"""

import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import torch

from trainer.rollouts.rollout import Rollout, Score
from trainer.teacher.teacher import Teacher


@dataclass(frozen=True)
class Scored:
    """The scores of a round.

    Attributes:
        scores: In the order of its rollouts.
        seconds: How long the teacher took.
    """

    scores: tuple[Score, ...]
    seconds: float


def score_rollouts(teacher: Teacher, rollouts: Sequence[Rollout], topk: int) -> Scored:
    """Ask for the log-probabilities of all sampled tokens of some rollouts, in one call.

    Args:
        teacher: Who is asked.
        rollouts: Of one round.
        topk: K of the likeliest tokens that are wanted too; 0 for none.

    Raises:
        TeacherError: There is no usable answer.
    """
    began = time.perf_counter()
    wanted = [range(len(one.request.prompt) - 1, one.length - 1) for one in rollouts]
    found = teacher.score([one.tokens.tolist() for one in rollouts], wanted, topk) if rollouts else []
    scores = tuple(Score(one.label_logprob, one.ids, one.logprobs, one.tail_mass) for one in found)
    return Scored(scores, time.perf_counter() - began)


class Scorer:
    """Scores rounds in the order in which they are handed in.

    Args:
        teacher: Who is asked, by this thread alone; closed with it.
        topk: K of the likeliest tokens that are wanted too.
        device: Where a local teacher computes.
        threads: Intra-op threads of torch; a new thread would have a number of its own, and round otherwise.
        asynchronous: Score beside the caller; False scores inside `submit`, with the same result.
    """

    def __init__(
        self, teacher: Teacher, *, topk: int, device: torch.device, threads: int, asynchronous: bool = True
    ) -> None:
        self._teacher, self._topk, self._device, self._threads = teacher, topk, device, threads
        self._pool = ThreadPoolExecutor(1, "teacher") if asynchronous else None
        self._rounds: dict[int, Future[Scored]] = {}

    def submit(self, number: int, rollouts: Sequence[Rollout]) -> None:
        """Hand in a round."""
        if self._pool is not None:
            self._rounds[number] = self._pool.submit(self._score, rollouts)
            return
        done: Future[Scored] = Future()
        done.set_result(score_rollouts(self._teacher, rollouts, self._topk))
        self._rounds[number] = done

    def finished(self, number: int) -> Scored | None:
        """Return a round's scores if they are there; it is still to be collected."""
        future = self._rounds.get(number)
        there = future is not None and future.done() and future.exception() is None
        return future.result() if future is not None and there else None

    def collect(self, number: int) -> Scored:
        """Wait for a round's scores and hand them out, once.

        Raises:
            TeacherError: The teacher had no usable answer.
        """
        return self._rounds.pop(number).result()

    def close(self) -> None:
        """Forget what was not begun, have the teacher give up what was, and let it go."""
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._teacher.give_up()  # nobody collects what it says now, and it may be asking for half an hour
            self._pool.shutdown(wait=True)
        self._rounds.clear()
        self._teacher.close()

    def _score(self, rollouts: Sequence[Rollout]) -> Scored:
        if self._device.type != "cuda":
            torch.set_num_threads(self._threads)
            return score_rollouts(self._teacher, rollouts, self._topk)
        # A stream of its own, or its kernels would wait for the student's and hold them up.
        with torch.cuda.device(self._device), torch.cuda.stream(torch.cuda.Stream(self._device)):
            return score_rollouts(self._teacher, rollouts, self._topk)
