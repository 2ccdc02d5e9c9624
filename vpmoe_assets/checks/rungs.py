"""Checks that rungs share: what a conversion measured of itself, distance to its source, a healing run."""

from collections.abc import Mapping

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check, check
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.verdict import Verdict

_DIVERGED_NATS = 0.5
"""A healing run whose held-out loss ends this far above its start has diverged."""


def measured(name: str, description: str, *, blocking: bool) -> Check:
    """Return the check that passes on what the conversion itself found, after it had read back its result."""

    @check(name, blocking=blocking, description=description)
    def found(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        finding = item.summary["checks"].get(name)
        if finding is None:
            raise EvidenceMissing(f"the conversion did not measure {name}")
        return Verdict(bool(finding["passed"]), str(finding["description"]), dict(finding["metadata"]))

    return found


def distance(name: str, column: str, description: str) -> Check:
    """Return the check that no layer's output points away from the source's."""

    @check(name, blocking=False, description=description)
    def cosine(item: Published, inputs: Mapping[str, Published]) -> Verdict:
        cosines = [row[column] for row in item.summary["layers"]]
        mean = sum(cosines) / len(cosines)
        return Verdict(
            min(cosines) > 0,
            f"cosine of the residual streams: mean {mean:.3f}, least {min(cosines):.3f}, "
            f"last {cosines[-1]:.3f}",
            {"mean": mean, "min": min(cosines), "last": cosines[-1]},
        )

    return cosine


@check(
    "loss_not_diverged",
    blocking=False,
    description=f"The held-out loss ends at most {_DIVERGED_NATS} nats above its start.",
)
def loss_not_diverged(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Compare the held-out loss at the end with that at the start."""
    found = item.summary
    start, end = found["heldout_loss_start"], found["heldout_loss_end"]
    return Verdict(
        end <= start + _DIVERGED_NATS,
        f"held-out loss {start:.3f} → {end:.3f} nats per token",
        {"start": start, "end": end, "uniform": found["uniform_loss"]},
    )
