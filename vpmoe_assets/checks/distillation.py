"""Checks of an on-policy run, over what it logged step by step."""

from collections.abc import Mapping, Sequence
from typing import Any

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import check
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.verdict import Verdict

_LOST = 0.05
"""A run that ends with this share of valid answers less than it began with has lost the format."""
_DROPPED = 0.1
"""More than this share of the rollouts dropped for their age is time of student and teacher wasted."""


@check(
    "harmony_validity",
    blocking=False,
    description=f"The share of answers in Harmony's format ends at most {_LOST:.0%} below its beginning.",
)
def harmony_validity(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Compare the rollouts of the first quarter of the steps with those of the last."""
    rates = [point["rollouts/valid_rate"] for point in _steps(item)]
    part = max(1, len(rates) // 4)
    first, last = _mean(rates[:part]), _mean(rates[-part:])
    return Verdict(
        last >= first - _LOST,
        f"{first:.1%} of the answers are valid at the beginning, {last:.1%} at the end",
        {"first": first, "last": last, "mean": _mean(rates)},
    )


@check(
    "buffer_health",
    blocking=False,
    description=f"Every step has rollouts to train on, and at most {_DROPPED:.0%} are dropped for their age.",
)
def buffer_health(item: Published, inputs: Mapping[str, Published]) -> Verdict:
    """Add up what the steps trained on and what grew too old for them."""
    steps = _steps(item)
    trained = sum(point["rollouts/trained"] for point in steps)
    dropped = steps[-1]["rollouts/dropped_total"]
    dry = [point["step"] for point in steps if not point["rollouts/trained"]]
    ages = staleness(steps)
    age = sum(int(name) * count for name, count in ages.items()) / max(trained, 1)
    share = dropped / max(trained + dropped, 1)
    faults = []
    if dry:
        faults.append(f"steps {', '.join(map(str, dry[:8]))} had no rollout to train on")
    if share > _DROPPED:
        faults.append(
            f"{dropped} of {trained + dropped} rollouts grew too old: lower buffer_size, or raise "
            "max_staleness"
        )
    found = {"trained": trained, "dropped": dropped, "dry_steps": len(dry), "mean_staleness": age}
    return Verdict.of(faults, f"{trained} rollouts trained on, {dropped} dropped, {age:.2f} steps old", found)


def staleness(points: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    """Return how many rollouts were so many steps old when they were trained on, over all steps."""
    prefix = "rollouts/staleness/"
    counts: dict[str, int] = {}
    for point in points:
        for key, count in point.items():
            if key.startswith(prefix):
                age = key.removeprefix(prefix)
                counts[age] = counts.get(age, 0) + int(count or 0)
    return dict(sorted(counts.items(), key=lambda item: int(item[0])))


def _steps(item: Published) -> list[dict[str, Any]]:
    """Return the lines of the steps, the last one of each where a run went on from a checkpoint."""
    steps = {point["step"]: point for point in item.points if "rollouts/trained" in point}
    if not steps:
        raise EvidenceMissing("nothing was logged of rollouts")
    return [steps[number] for number in sorted(steps)]


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
