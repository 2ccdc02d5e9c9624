"""Kinds of samples that a training run mixes: what the data bring and an objective weighs."""

from dataclasses import dataclass
from typing import Final

CONVERSATIONS: Final = "conversations"
TEXT: Final = "text"
SCORED: Final = "scored"
"""Conversations that a teacher has scored; the stored records ride in the batch."""
ROLLOUTS: Final = "rollouts"
"""Conversations that the student wrote and a teacher scored, while it trains."""


@dataclass(frozen=True)
class Mix:
    """At most two kinds of samples, one of them with a share, the other with what is left.

    Attributes:
        first: The kind that `share` is the share of.
        share: In [0, 1]; its shortest decimal form is what counts (0.2 is exactly one fifth).
        rest: The other kind.
    """

    first: str
    share: float
    rest: str

    @property
    def kinds(self) -> tuple[str, ...]:
        """Kinds that there are samples of, the first one first."""
        return (*((self.first,) if self.share > 0 else ()), *((self.rest,) if self.share < 1 else ()))

    @property
    def shares(self) -> dict[str, float]:
        """Share of each of these kinds in the samples of a run."""
        found = {self.first: self.share, self.rest: 1.0 - self.share}
        return {kind: found[kind] for kind in self.kinds}
