"""Where the nodes of a graph go in a picture: rows from the first ancestors down to the last descendants.

The method is Sugiyama's, in its small form: a node's row is the length of the longest way to it; an edge over
several rows goes through a waypoint in each; rows are ordered by the mean place of their neighbours, up and
down a few times (K. Sugiyama et al., IEEE Trans. SMC 11(2), 1981, steps 1 to 3); places follow the neighbours
as far as the order and the gaps allow.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vpmoe_assets.lineage.graph import Graph

_SWEEPS = 6
_STRAIGHTER = 24
"""Sweeps that place what is ordered: long edges come straight slowly."""
_PULL = 0.25
"""How much everything is drawn to the middle: a long ladder would slide to one side."""
_NARROW = 0.12
"""Room that a waypoint takes beside what a node takes."""


@dataclass(frozen=True)
class Layout:
    """Where things are.

    Attributes:
        places: (place in its row in nodes, number of the row) of each node, by record digest; from 0 on.
        ways: The points of each of the graph's edges, in their order, from the parent to the child.
        columns: Width in nodes.
        rows: Height in nodes.
    """

    places: Mapping[str, tuple[float, int]]
    ways: tuple[tuple[tuple[float, int], ...], ...]
    columns: float
    rows: int


def lay_out(graph: Graph) -> Layout:
    """Return where the nodes and edges of a graph go; the same graph always gives the same."""
    row = _rows(graph)
    points = [node.record_digest for node in graph.ordered()]
    chains: list[list[str]] = []
    for edge in graph.edges:
        # The edges of one node share their waypoints: an input of ten things is one line that forks.
        between = {f"{edge.parent}:{each}": each for each in range(row[edge.parent] + 1, row[edge.child])}
        points += [point for point in between if point not in row]
        row |= between
        chains.append([edge.parent, *between, edge.child])
    above: dict[str, list[str]] = {point: [] for point in points}
    below: dict[str, list[str]] = {point: [] for point in points}
    for chain in chains:
        for upper, lower in pairwise(chain):
            if upper not in above[lower]:
                above[lower].append(upper)
                below[upper].append(lower)
    levels: list[list[str]] = [[] for _ in range(max(row.values()) + 1)]
    for point in points:
        levels[row[point]].append(point)
    _order(levels, above, below)
    width = {point: (1.0 if point in graph.nodes else _NARROW) for point in points}
    x = _places(levels, above, below, width)
    left = min(x[point] - width[point] / 2 for point in points)
    right = max(x[point] + width[point] / 2 for point in points)
    return Layout(
        places={digest: (x[digest] - left - 0.5, row[digest]) for digest in graph.nodes},
        ways=tuple(tuple((x[point] - left - 0.5, row[point]) for point in chain) for chain in chains),
        columns=right - left,
        rows=len(levels),
    )


def _rows(graph: Graph) -> dict[str, int]:
    row: dict[str, int] = {}
    for node in graph.ordered():
        parents = [row[e.parent] for e in graph.parents.get(node.record_digest, ()) if e.parent in row]
        row[node.record_digest] = max(parents, default=-1) + 1
    # A source stands right above the first that was made from it, not far away at the top.
    for node in reversed(graph.ordered()):
        children = [row[e.child] for e in graph.children.get(node.record_digest, ())]
        if children and not graph.parents.get(node.record_digest):
            row[node.record_digest] = max(0, min(children) - 1)
    return row


def _order(
    levels: list[list[str]], above: Mapping[str, Sequence[str]], below: Mapping[str, Sequence[str]]
) -> None:
    """Order each row by the mean place of the neighbours in the row before, downwards and upwards in turn."""
    for sweep in range(_SWEEPS):
        down = sweep % 2 == 0
        place: dict[str, float] = {}
        for level in levels if down else reversed(levels):
            wanted: dict[str, float] = {}
            for number, point in enumerate(level):
                own = (number + 0.5) / len(level)
                mean = _mean([place[p] for p in (above if down else below)[point] if p in place])
                wanted[point] = own if mean is None else mean
            level.sort(key=wanted.__getitem__)
            place |= {point: (number + 0.5) / len(level) for number, point in enumerate(level)}


def _places(
    levels: Sequence[Sequence[str]],
    above: Mapping[str, Sequence[str]],
    below: Mapping[str, Sequence[str]],
    width: Mapping[str, float],
) -> dict[str, float]:
    """Return the centre of each point: near its neighbours, in the order of its row, without overlap."""
    x: dict[str, float] = {}
    for level in levels:
        edge = -sum(width[point] for point in level) / 2
        for point in level:
            x[point] = edge + width[point] / 2
            edge += width[point]
    centred = dict(x)
    for sweep in range(_STRAIGHTER):
        for level in levels if sweep % 2 == 0 else reversed(levels):
            wanted = []
            for point in level:
                mean = _mean([x[each] for each in (*above[point], *below[point])])
                near = x[point] if mean is None else mean
                wanted.append((1 - _PULL) * near + _PULL * centred[point])
            for point, centre in zip(level, apart(wanted, [width[point] for point in level]), strict=True):
                x[point] = centre
    return x


def apart(wanted: Sequence[float], widths: Sequence[float]) -> list[float]:
    """Return places in the same order that keep their distance, near the wanted ones.

    Pushed apart to the right, and to the left: both keep the distances, and so does the mean of the two.
    """
    right, left = list(wanted), list(wanted)
    for this in range(1, len(wanted)):
        right[this] = max(right[this], right[this - 1] + (widths[this - 1] + widths[this]) / 2)
    for this in range(len(wanted) - 2, -1, -1):
        left[this] = min(left[this], left[this + 1] - (widths[this + 1] + widths[this]) / 2)
    return [(a + b) / 2 for a, b in zip(left, right, strict=True)]


def _mean(values: Sequence[float]) -> float | None:
    return sum(values) / len(values) if values else None
