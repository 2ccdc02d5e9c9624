"""Teachers whose weights are in this process."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import torch

from trainer.errors import TeacherError
from trainer.evaluate.models import LanguageModel
from trainer.teacher.distributions import distributions, uniforms
from trainer.teacher.rows import Batch, batches, plan
from trainer.teacher.teacher import TailDraws, Teacher, TeacherScores

BATCH_TOKENS = {"cpu": 1 << 13, "cuda": 1 << 16}
"""Positions of a batch, padding included, by type of device."""


class LocalTeacher(Teacher):
    """A model in memory.

    Args:
        model: The model; its tokenizer is not needed.
        digest: Of the weights' directory, for the identity.
        tokenizer_sha256: See `Teacher`.
        batch_tokens: Most positions of a batch; what suits the device by default.
        share_prompts: Run a prompt once for all its completions where the model can.
    """

    kind: ClassVar[str]

    def __init__(
        self,
        model: LanguageModel,
        *,
        digest: str,
        tokenizer_sha256: str | None,
        batch_tokens: int | None = None,
        share_prompts: bool = True,
    ) -> None:
        self.model, self.digest = model, digest
        self.tokenizer_sha256 = tokenizer_sha256
        self.vocab_size, self.context = model.vocab_size, model.context
        self.batch_tokens = batch_tokens or BATCH_TOKENS[model.device.type]
        self.share_prompts = share_prompts and model.shares_prefixes

    def identity(self) -> dict[str, Any]:
        """Return kind and digest of the weights, and the type they compute in."""
        return local_identity(self.kind, self.digest, self.model.dtype)

    @torch.no_grad()
    def _score(
        self,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        tail: TailDraws | None,
    ) -> list[TeacherScores]:
        draws = 0 if tail is None else tail.count
        found: dict[int, TeacherScores] = {}
        rows = plan(sequences, wanted, share=self.share_prompts)
        for batch, hidden in self._read(list(batches(rows, self.batch_tokens))):
            found.update(self._batch(batch, hidden, sequences, wanted, topk, mass, tail))
        nothing = TeacherScores.of_nothing(topk, draws)
        return [found.get(number, nothing) for number in range(len(sequences))]

    def _read(self, work: Sequence[Batch]) -> Iterator[tuple[Batch, torch.Tensor]]:
        """Yield batches, each with its final hidden states.

        On a CPU the next one is read while the caller boils down the last: reading is many small operations
        that leave cores idle.
        """
        if self.model.device.type != "cpu" or len(work) < 2:
            for batch in work:
                yield batch, self._hidden(batch)
            return
        threads = torch.get_num_threads()
        with ThreadPoolExecutor(1, "hidden", initializer=torch.set_num_threads, initargs=(threads,)) as pool:
            ahead = pool.submit(self._hidden, work[0])
            for number, batch in enumerate(work):
                hidden = ahead.result()
                if number + 1 < len(work):
                    ahead = pool.submit(self._hidden, work[number + 1])
                yield batch, hidden

    def _hidden(self, batch: Batch) -> torch.Tensor:
        """Return final hidden states `[B, S, H]`."""
        if batch.rows[0].tree:
            return self.model.hidden_trees(batch.tokens, batch.positions, batch.branch)
        return self.model.hidden(batch.tokens, torch.tensor([len(row.tokens) for row in batch.rows]))

    def _batch(
        self,
        batch: Batch,
        hidden: torch.Tensor,
        sequences: Sequence[Sequence[int]],
        wanted: Sequence[Sequence[int]],
        topk: int,
        mass: float | None,
        tail: TailDraws | None,
    ) -> dict[int, TeacherScores]:
        reads = [(place, number, at) for place, row in enumerate(batch.rows) for number, at in row.reads]
        at_row = torch.tensor([place for place, _, at in reads for _ in at], device=hidden.device)
        at_token = torch.tensor([token for _, _, at in reads for token in at], device=hidden.device)
        labels = [sequences[number][at + 1] for _, number, _ in reads for at in wanted[number]]
        counts = [len(at) for _, _, at in reads]
        scores = distributions(
            self.model,
            hidden[at_row, at_token],
            torch.tensor(labels, dtype=torch.int64),
            topk,
            mass=mass,
            chances=None
            if tail is None
            else uniforms([tail.keys[number] for _, number, _ in reads], counts, tail.count),
        )
        if not np.isfinite(scores.label_logprob).all():
            raise TeacherError(
                f"{self.model.name}: the teacher's log-probabilities are not finite; its weights are "
                "damaged, or "
                f"{self.model.dtype} is too narrow for them: compute in fp32"
            )
        ends = np.cumsum(counts).tolist()
        return {
            number: _part(scores, end - count, end)
            for (_, number, _), count, end in zip(reads, counts, ends, strict=True)
        }


def local_identity(kind: str, digest: str, dtype: torch.dtype) -> dict[str, Any]:
    """Return the identity of a teacher with weights."""
    return {"kind": kind, "digest": digest, "dtype": str(dtype).removeprefix("torch.")}


def _part(scores: TeacherScores, start: int, stop: int) -> TeacherScores:
    return TeacherScores(
        scores.label_logprob[start:stop],
        scores.ids[start:stop],
        scores.logprobs[start:stop],
        scores.tail_mass[start:stop],
        scores.draws[start:stop],
    )
