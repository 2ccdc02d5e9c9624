"""Where a training run gets its rollouts from: made, scored, kept and handed out by the logical clock.

At the beginning of every step the engine calls `prepare`, on all ranks. It lets the student answer the rounds
that are due, hands them to the teacher, and waits for the scores of this step's round; `take` fills the
step's rows, which `sample` then gives out one by one. Whether the teacher scores beside the student or is
waited for at once changes no bit.
"""

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from megatron.core import parallel_state
from torch import nn

from trainer.contract.files import sync
from trainer.contract.schema.distillation import Rollouts
from trainer.data.kd import Sample
from trainer.data.live import LiveSource
from trainer.errors import DataError
from trainer.job.distributed import Layout, agree
from trainer.job.metrics import Value
from trainer.rollouts.answering import Answering, attempted, gathered, share
from trainer.rollouts.buffer import Buffer
from trainer.rollouts.clock import Clock
from trainer.rollouts.forms import Form
from trainer.rollouts.history import History
from trainer.rollouts.metrics import round_metrics, step_metrics
from trainer.rollouts.pack import pack_row
from trainer.rollouts.prompts import Prompts, PromptWalk
from trainer.rollouts.rollout import Rollout
from trainer.rollouts.scoring import Scorer
from trainer.rollouts.storage import buffer_bytes, read_buffer, round_bytes

BUFFER_NAME = "buffer.safetensors"


class RolloutSource(LiveSource):
    """The rollouts of a run. Collective: all ranks call the same methods in the same order.

    Args:
        asked: The recipe's `rollouts`.
        prompts: What there is to ask.
        scorer: Asks the teacher.
        form: Of the answers.
        history: Where rounds are kept.
        layout: The parallel layout.
        seed: The experiment's.
        steps: Of the run.
        seq_len: Tokens of a row.
        eod: Fills rows.
        between: Called before every step of the decoder.
        rows: Most answers that are sampled side by side; decides how they round, so the same for a whole run.

    Attributes:
        step: The present one.
        epoch: Of the next prompt.
        clock: When what is made.
        walk: Over the prompts.
        buffer: What waits.
    """

    def __init__(
        self,
        asked: Rollouts,
        *,
        prompts: Prompts,
        scorer: Scorer,
        form: Form,
        history: History,
        layout: Layout,
        seed: int,
        steps: int,
        seq_len: int,
        eod: int,
        between: Callable[[], None] | None = None,
        rows: int = 64,
    ) -> None:
        self._asked, self._scorer, self._form = asked, scorer, form
        self._history, self._layout, self._between = history, layout, between
        self._seq_len, self._eod = seq_len, eod
        self.clock = Clock(steps, asked.delay, asked.max_staleness, asked.buffer_size)
        self.walk = PromptWalk(
            prompts, asked.curriculum, seed=seed, steps=steps, longest=seq_len - asked.max_new_tokens
        )
        self.buffer = Buffer(self.clock)
        self._answering = Answering(seed, asked.max_new_tokens, asked.temperature, form, rows)
        self.step = self.epoch = 0
        self._rows: list[list[Rollout]] = []
        self._loaded: dict[str, Any] = {}
        self._began = 0.0
        self._metrics: dict[str, Value] = {}
        self._seconds = {"teacher": 0.0, "waited": 0.0, "answering": 0.0}

    # ---------------------------------------------------------------- a step

    def prepare(self, step: int, model: nn.Module) -> None:
        """Make what is due with the present weights, and wait for the scores of the step's round.

        Args:
            step: The step that begins, from 1.
            model: The student, with the weights after the step before.

        Raises:
            TeacherError: The teacher had no usable answer.
            DataError: No prompt is short enough.
            FloatingPointError: The student's logits are not finite.
        """
        self._began = began = time.perf_counter()
        if step == 1:
            self._history.go_on(0)  # rounds that an earlier start left
        for number in self.clock.due(step):
            self._make(number, model)
        self._seconds["answering"] = time.perf_counter() - began
        arrived = self._arrived(step)
        self._history.add(step, round_bytes(step, arrived))
        dropped = self.buffer.arrive(step, arrived)
        self.step, self.epoch, self._rows = step, self.walk.epoch, []
        self._metrics = round_metrics(arrived, self._form) | {
            "rollouts/dropped": dropped,
            "rollouts/dropped_total": self.buffer.dropped,
            "rollouts/under_way": sum(map(len, self.buffer.under_way.values())),
            "rollouts/prompts_skipped": self.walk.skipped,
        }

    def take(self, count: int) -> list[tuple[int, int]]:
        """Fill the rows of the present step from the pool; once a step.

        Returns:
            Their addresses: the step, and the number of the row.
        """
        self._rows = self.buffer.take(count, self._seq_len)
        self._metrics |= step_metrics(self._rows, self.clock, self.step, self._seq_len)
        self._metrics["rollouts/waiting"] = len(self.buffer.pool)
        return [(self.step, number) for number in range(count)]

    def sample(self, epoch: int, number: int) -> Sample:
        """Return one row of the present step, tensors [S] and [S, K], see `pack_row`."""
        return pack_row(
            self._row(epoch, number),
            seq_len=self._seq_len,
            eod=self._eod,
            form=self._form,
            topk=self._topk,
            mask_control=self._asked.exclude_special_tokens,
        )

    def describe(self, epoch: int, number: int) -> str:
        """Name a row of the present step for a person, by its first prompts."""
        names = [
            f"answer {one.request.sample} to conversation {one.request.document} of round {one.number}"
            for one in self._row(epoch, number)[:3]
        ]
        return f"row {number} of the rollouts of step {epoch} ({', '.join(names)})"

    def metrics(self) -> dict[str, Value]:
        """Return what the present step logs, when it has ended.

        Returns:
            Of `round_metrics` and `step_metrics`; `rollouts/dropped`, `rollouts/dropped_total`,
            `rollouts/waiting` and `rollouts/under_way` of the buffer; and three times as shares of the step:
            `rollouts/answering_share`, `rollouts/teacher_share` (the teacher at work on this round, beside
            the student) and `rollouts/teacher_wait_share` (the step stood still for it).
        """
        seconds = max(time.perf_counter() - self._began, 1e-9)
        return {
            **self._metrics,
            "rollouts/answering_share": self._seconds["answering"] / seconds,
            "rollouts/teacher_share": self._seconds["teacher"] / seconds,
            "rollouts/teacher_wait_share": self._seconds["waited"] / seconds,
        }

    def _row(self, step: int, number: int) -> list[Rollout]:
        if step != self.step:
            raise IndexError(f"rollouts of step {step} are gone: the present one is {self.step}")
        return self._rows[number]

    @property
    def _topk(self) -> int:
        return self._asked.baseline_topk if self._asked.baseline else 0

    def _make(self, number: int, model: nn.Module) -> None:
        """Let the student answer a round, and hand it to the teacher."""
        requests = self.walk.take(number, self.clock.per_round)
        mine = share(requests, self._layout)
        born = self.clock.born(number)
        answers = attempted(lambda: self._answering.answer(model, mine, number, born, self._between))
        made = gathered(answers, len(requests), self._layout)
        self.buffer.put(number, made)
        self._submit(number)

    def _submit(self, number: int) -> None:
        if self._asks:
            self._scorer.submit(number, share(self.buffer.under_way[number], self._layout))

    @property
    def _asks(self) -> bool:
        """Whether this rank asks the teacher: tensor-parallel ranks hold the same rollouts."""
        return bool(parallel_state.get_tensor_model_parallel_rank() == 0)

    def _arrived(self, step: int) -> Sequence[Rollout]:
        """Wait for the scores of a step's round."""
        began = time.perf_counter()
        made: Sequence[Rollout] = self.buffer.under_way[step]
        self._seconds["teacher"] = 0.0
        if not _is_scored(made):  # a checkpoint may have brought the scores along
            made = self._with_scores(step, made)
        self._seconds["waited"] = time.perf_counter() - began
        return made

    def _with_scores(self, number: int, made: Sequence[Rollout]) -> Sequence[Rollout]:
        def mine() -> Sequence[Any]:
            if not self._asks:
                return ()
            found = self._scorer.collect(number)
            self._seconds["teacher"] = found.seconds
            return found.scores

        scores = gathered(attempted(mine), len(made), self._layout)
        return [one.scored(score) for one, score in zip(made, scores, strict=True)]

    # ---------------------------------------------------------------- saving

    def state_dict(self) -> dict[str, Any]:
        """Return the place of the run in its rollouts; how fast its parts are has no part in it."""
        unscored = {
            number: [replace(one, score=None) for one in made]
            for number, made in self.buffer.under_way.items()
        }
        content = buffer_bytes(self.buffer.pool, unscored, {})
        return {
            "step": self.step,
            "prompts": self.walk.state_dict(),
            "dropped": self.buffer.dropped,
            "history_sha256": self._history.sha256,
            "buffer_sha256": hashlib.sha256(content).hexdigest(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to a saved place; `load` brings the rollouts.

        Raises:
            DataError: It is a place among other prompts.
        """
        self.walk.load_state_dict(state["prompts"])
        self.step, self.epoch = int(state["step"]), self.walk.epoch
        self.buffer.dropped = int(state["dropped"])
        self._history.sha256 = str(state["history_sha256"])
        self._loaded = dict(state)

    def save(self, directory: Path) -> None:
        """Write the buffer, with all scores that are there. Collective.

        Args:
            directory: Of a checkpoint; rank 0 writes.
        """
        content = self._content()
        if self._layout.leads:
            (directory / BUFFER_NAME).write_bytes(content)
            sync(directory / BUFFER_NAME)

    def load(self, directory: Path) -> None:
        """Take the buffer back; rounds that were under way without scores go to the teacher again.

        Args:
            directory: That `save` was given, after `load_state_dict`.

        Raises:
            DataError: It does not fit the place, this run or what is kept of it.
        """
        path = directory / BUFFER_NAME
        pool, under_way, stored = read_buffer(path.read_bytes())
        if stored != self._loaded:
            raise DataError(f"{path} is of another moment: {stored}, not {self._loaded}")
        wanted = list(self.clock.under_way(self.step))
        if sorted(under_way) != wanted:
            raise DataError(f"{path} has rounds {sorted(under_way)} under way, expected {wanted}")
        self.buffer.pool, self.buffer.under_way = pool, dict(under_way)
        self._history.go_on(self.step, self._history.sha256)
        for number, made in sorted(under_way.items()):
            if not _is_scored(made):
                self._submit(number)

    def _content(self) -> bytes:
        under_way: dict[int, Sequence[Rollout]] = {}
        for number, made in sorted(self.buffer.under_way.items()):
            under_way[number] = made
            mine = None if not self._asks else self._scorer.finished(number)
            there = _is_scored(made) or not self._asks or mine is not None
            if _is_scored(made) or agree(not there):
                continue
            own = () if mine is None else mine.scores
            scores = gathered(own, len(made), self._layout)
            under_way[number] = [one.scored(score) for one, score in zip(made, scores, strict=True)]
        return buffer_bytes(self.buffer.pool, under_way, self.state_dict())

    def close(self) -> None:
        """Let the teacher go."""
        self._scorer.close()


def _is_scored(rollouts: Sequence[Rollout]) -> bool:
    return all(one.score is not None for one in rollouts)
