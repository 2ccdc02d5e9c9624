"""What a teacher says of the supervised tokens of one sequence, and what a store asks of it."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from trainer.contract.topk.errors import StoreError

LOWEST_LOGPROB = -10_000.0
"""No log-prob lies below it; servers write such numbers for "none"."""
MASS_TOLERANCE = 0.01
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
                    f"records: {name} is {found.dtype} {list(found.shape)}, expected {np.dtype(dtype)}"
                    f" {list(shape)}; score with topk = {topk} and tail_draws = {tail_draws}"
                )
        present = self.ids >= 0
        self._refuse(~(self.label_logprob <= 0) | (self.label_logprob < LOWEST_LOGPROB), "label_logprob", "0")
        self._refuse(~((self.tail_mass >= 0) & (self.tail_mass <= 1)), "tail_mass", "1, and not below 0")
        self._refuse((self.ids < -1) | (self.ids >= vocabulary), "ids", f"{vocabulary - 1}, or -1 for none")
        self._refuse((self.draws < -1) | (self.draws >= vocabulary), "draws", f"{vocabulary - 1}")
        impossible = ~((self.logprobs <= 0) & (self.logprobs >= LOWEST_LOGPROB))
        self._refuse(
            np.where(present, impossible, self.logprobs != -np.inf), "logprobs", "0 (-inf beside -1)"
        )
        self._refuse(present[:, 1:] & ~present[:, :-1], "ids", "an id after a -1")
        with np.errstate(invalid="ignore"):
            rising = self.logprobs[:, 1:] > self.logprobs[:, :-1]
        self._refuse(rising, "logprobs", "the one before it: sort them by falling probability")
        ordered = np.sort(self.ids, axis=1)
        self._refuse(
            (ordered[:, 1:] == ordered[:, :-1]) & (ordered[:, 1:] >= 0), "ids", "once: one is twice there"
        )
        mass = np.exp(self.logprobs.astype(np.float64)).sum(axis=1) + self.tail_mass
        self._refuse(mass > 1 + MASS_TOLERANCE * logprob_error, "probabilities", "1 together with the tail")
        if tail_draws:
            self._refuse(
                (self.draws < 0) & (self.tail_mass > 0)[:, None], "draws", "-1 although there is a tail"
            )

    def _refuse(self, wrong: NDArray[np.bool_], name: str, limit: str) -> None:
        if wrong.any():
            row = int(np.argwhere(wrong)[0][0])
            found = getattr(self, name, None)
            shown = "" if found is None else f" {np.asarray(found[row]).tolist()}"
            raise StoreError(f"records: {name}{shown[:200]} at position {row}; expected at most {limit}")
