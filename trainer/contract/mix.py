"""How a recipe mixes kinds of samples: which they are, and the share of each."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from trainer.contract.kinds import CONVERSATIONS, ROLLOUTS, SCORED, TEXT

if TYPE_CHECKING:
    from trainer.contract.schema.training import TrainRecipe


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


def mix_of(recipe: "TrainRecipe") -> Mix:
    """Return the kinds of samples that a recipe mixes."""
    if recipe.scored is not None:
        return Mix(SCORED, recipe.scored.fraction, CONVERSATIONS)
    if recipe.rollouts is not None:
        return Mix(CONVERSATIONS, recipe.rollouts.anchor_fraction, ROLLOUTS)
    return Mix(CONVERSATIONS, recipe.harmony_fraction, TEXT)
