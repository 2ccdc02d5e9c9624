"""What a teacher says of the supervised tokens of one sequence, and what a store asks of it."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.errors import StoreError

LOWEST_LOGPROB = -10_000.0
"""No log-prob lies below it; servers write such numbers for "none"."""
MASS_TOLERANCE = 0.005
"""How far the mass of a record may exceed 1, in units of the bound of its log-probs: rounding of float32."""


@dataclass(frozen=True)
class TopKRecords:
    """The records of one sequence: n supervised positions, in order.

    Attributes:
        label_logprob: Log-prob of the token that stands there, float32 [n].
        ids: Token ids by falling probability, int32 [n, K]; -1 from where an adaptive K ended.
        logprobs: Their log-probs at temperature 1, float32 [n, K]; -inf where `ids` is -1.
        tail_mass: Probability of all other ids together, float32 [n].
        draws: Ids drawn from the tail, i.i.d. by its probabilities, int32 [n, M]; -1 where the tail is empty.
            Each weighs `tail_mass / M`.
    """

    label_logprob: NDArray[np.float32]
    ids: NDArray[np.int32]
    logprobs: NDArray[np.float32]
    tail_mass: NDArray[np.float32]
    draws: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.label_logprob)

    def __getitem__(self, rows: slice) -> "TopKRecords":
        """Return the records of some positions."""
        return TopKRecords(
            self.label_logprob[rows],
            self.ids[rows],
            self.logprobs[rows],
            self.tail_mass[rows],
            self.draws[rows],
        )

    @property
    def counts(self) -> NDArray[np.int64]:
        """Ids that each position has, [n]."""
        counts: NDArray[np.int64] = np.count_nonzero(self.ids >= 0, axis=1)
        return counts

    def check(self, topk: int, tail_draws: int, vocabulary: int, logprob_error: float) -> None:
        """Refuse what is not a teacher's answer.

        Args:
            topk: K; no position has more ids.
            tail_draws: M.
            vocabulary: Ids are below it.
            logprob_error: Bound of the store; how much mass above 1 is rounding follows from it.

        Raises:
            StoreError: If shapes, types, ids, their order, their mass or a log-prob are impossible. The
                message says which position and what was found.
        """
        n = len(self)
        for name, shape, dtype in (
            ("label_logprob", (n,), np.float32),
            ("ids", (n, topk), np.int32),
            ("logprobs", (n, topk), np.float32),
            ("tail_mass", (n,), np.float32),
            ("draws", (n, tail_draws), np.int32),
        ):
            found = getattr(self, name)
            if found.shape != shape or found.dtype != dtype:
                raise StoreError(
                    f"{name} is {found.dtype} {list(found.shape)}, expected {np.dtype(dtype)} {list(shape)};"
                    f" score with topk = {topk} and tail_draws = {tail_draws}"
                )
        present, drawn = self.ids >= 0, self.draws >= 0
        range_of_ids = f"ids are from 0 to {vocabulary - 1}, and -1 is none"
        range_of_logprobs = f"log-probs are from {LOWEST_LOGPROB:.0f} to 0"
        label, kept = self.label_logprob, self.logprobs
        possible = (kept <= 0) & (kept >= LOWEST_LOGPROB)
        ordered = np.sort(self.ids, axis=1)
        with np.errstate(invalid="ignore"):
            rising = kept[:, 1:] > kept[:, :-1]
        mass = np.exp(kept.astype(np.float64)).sum(axis=1) + self.tail_mass
        for name, wrong, rule in (
            ("label_logprob", ~((label <= 0) & (label >= LOWEST_LOGPROB)), range_of_logprobs),
            ("tail_mass", ~((self.tail_mass >= 0) & (self.tail_mass <= 1)), "it is a probability"),
            ("ids", (self.ids < -1) | (self.ids >= vocabulary), range_of_ids),
            ("ids", present[:, 1:] & ~present[:, :-1], "no id follows a -1"),
            ("ids", (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), "each id stands once"),
            ("logprobs", present & ~possible, range_of_logprobs),
            ("logprobs", ~present & (kept != -np.inf), "beside an id of -1 stands -inf"),
            ("logprobs", rising, "they fall"),
            ("logprobs", mass > 1 + MASS_TOLERANCE * logprob_error, "with the tail their mass is at most 1"),
            ("draws", (self.draws < -1) | (self.draws >= vocabulary), range_of_ids),
            ("draws", drawn != drawn[:, :1], "a position has all draws or none"),
            ("draws", ~drawn & (self.tail_mass > 0)[:, None], "there is a tail, so it is drawn from"),
        ):
            if wrong.any():
                row = int(np.argwhere(wrong)[0][0])
                found = str(getattr(self, name)[row].tolist())[:120]
                raise StoreError(f"position {row} has {name} {found}: {rule}; mend the teacher's answer")


def joined(parts: Sequence[TopKRecords]) -> TopKRecords:
    """Return the records of several sequences, one behind the other."""
    return TopKRecords(
        np.concatenate([part.label_logprob for part in parts]),
        np.concatenate([part.ids for part in parts]),
        np.concatenate([part.logprobs for part in parts]),
        np.concatenate([part.tail_mass for part in parts]),
        np.concatenate([part.draws for part in parts]),
    )
