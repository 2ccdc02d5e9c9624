"""Where a chain of artifacts is broken first: of all that is wrong, what everything else may come from."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from typing import Any

from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import version_name


@dataclass(frozen=True)
class Broken:
    """A link that is broken, none of whose ancestors is.

    Attributes:
        artifact: `experiment/asset/version`, or as much of it as is known.
        problems: What is wrong with it.
        below: The versions that were made from it, however far down, nearest first.
    """

    artifact: str
    problems: Sequence[Problem]
    below: Sequence[str]

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        problems = [each.to_dict() for each in self.problems]
        return {"artifact": self.artifact, "problems": problems, "below": list(self.below)}

    def __str__(self) -> str:
        first = self.problems[0]
        return f"{self.artifact} ({first.path}: {first.kind})"


def broken_links(heads: Iterable[Head], problems: Iterable[Problem]) -> list[Broken]:
    """Return the broken links above which nothing is broken, those with the most below them first.

    Args:
        heads: Of what was verified.
        problems: That were found.
    """
    made_from = {
        version_name(head): [f"{head.experiment}/{each.asset}/{each.version}" for each in head.inputs]
        for head in heads
    }
    wrong: dict[str, list[Problem]] = {}
    for problem in problems:
        if problem.severity == "problem":
            wrong.setdefault(problem.artifact, []).append(problem)
    try:
        order = list(TopologicalSorter(made_from).static_order())
    except CycleError:  # of forged records; then nothing is above anything
        order = sorted({*made_from, *(name for names in made_from.values() for name in names)})
    place = {name: position for position, name in enumerate(order)}
    tainted: set[str] = set()
    first: list[str] = []
    for name in order:
        above = any(parent in tainted for parent in made_from.get(name, ()))
        if name in wrong and not above:
            first.append(name)
        if name in wrong or above:
            tainted.add(name)
    first += [name for name in wrong if name not in place]
    found = [Broken(name, wrong[name], _below(name, order, made_from)) for name in first]
    return sorted(found, key=lambda each: (-len(each.below), each.artifact))


def _below(name: str, order: Sequence[str], made_from: Mapping[str, Sequence[str]]) -> list[str]:
    reached = {name}
    for each in order:
        if not reached.isdisjoint(made_from.get(each, ())):
            reached.add(each)
    return [each for each in order if each in reached and each != name]
