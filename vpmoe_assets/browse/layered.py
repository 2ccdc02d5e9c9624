"""A directed graph without circles laid out in layers, as Sugiyama, Tagawa and Toda (1981) do.

Each node stands one layer above the first that is made from it. An edge over several layers runs through a
bend in each of them, and the edges of one node share their bends, so that an input of ten things is one line
that forks. Nodes of a layer are ordered by the mean of their neighbours, which leaves few crossings.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from graphlib import TopologicalSorter
from typing import Self

from vpmoe_assets.lineage.export.layout import apart

Bend = tuple[str, int]
"""Where the edges of a node pass a layer; the node itself is the bend of its own layer."""
_SWEEPS = 12
_PULL = 0.3
"""How much a row is drawn to the middle: a long ladder would slide to one side."""


@dataclass(frozen=True)
class Layout:
    """Where everything stands.

    Attributes:
        at: Centre of each node and bend, horizontally, in units.
        layer: Of each node, from the top.
        edges: From bend to bend, each one layer further down.
        width: Of all.
        layers: How many.
    """

    at: Mapping[Bend, float]
    layer: Mapping[str, int]
    edges: Sequence[tuple[Bend, Bend]]
    width: float
    layers: int

    @classmethod
    def of(cls, parents: Mapping[str, Sequence[str]], *, node: float, bend: float) -> Self:
        """Lay a graph out.

        Args:
            parents: Of each node, nodes too.
            node: Width of a node with the space beside it.
            bend: Width of a bend with the space beside it.

        Raises:
            graphlib.CycleError: There is a circle, which records cannot form.
        """
        order = list(TopologicalSorter(parents).static_order())
        layer = _layers(order, parents)
        edges = _edges(parents, layer)
        rows: list[list[Bend]] = [[] for _ in range(max(layer.values(), default=-1) + 1)]
        for name in order:
            rows[layer[name]].append((name, layer[name]))
        for _, end in edges:
            if end not in rows[end[1]]:
                rows[end[1]].append(end)
        up: dict[Bend, list[Bend]] = {each: [] for row in rows for each in row}
        down: dict[Bend, list[Bend]] = {each: [] for row in rows for each in row}
        for start, end in edges:
            down[start].append(end)
            up[end].append(start)
        _untangle(rows, up, down)
        sizes = {each: node if layer[each[0]] == each[1] else bend for row in rows for each in row}
        at = _placed(rows, up, down, sizes)
        left = min((x - sizes[each] / 2 for each, x in at.items()), default=0.0)
        right = max((x + sizes[each] / 2 for each, x in at.items()), default=0.0)
        return cls({each: x - left for each, x in at.items()}, layer, edges, right - left, len(rows))


def _layers(order: Sequence[str], parents: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """Return the layer of each node: as far down as its depth, then down to just above its first child."""
    layer: dict[str, int] = {}
    children: dict[str, list[str]] = {name: [] for name in order}
    for name in order:
        layer[name] = max((layer[parent] + 1 for parent in parents[name]), default=0)
        for parent in parents[name]:
            children[parent].append(name)
    for name in reversed(order):
        if children[name]:
            layer[name] = min(layer[child] for child in children[name]) - 1
    return layer


def _edges(parents: Mapping[str, Sequence[str]], layer: Mapping[str, int]) -> list[tuple[Bend, Bend]]:
    edges: dict[tuple[Bend, Bend], None] = {}
    for name, above in parents.items():
        for parent in above:
            start = (parent, layer[parent])
            for level in range(layer[parent] + 1, layer[name]):
                edges[start, (parent, level)] = None
                start = (parent, level)
            edges[start, (name, layer[name])] = None
    return list(edges)


def _untangle(
    rows: list[list[Bend]], up: Mapping[Bend, Sequence[Bend]], down: Mapping[Bend, Sequence[Bend]]
) -> None:
    for sweep in range(_SWEEPS):
        neighbours, others = (up, rows) if sweep % 2 == 0 else (down, rows[::-1])
        place: dict[Bend, float] = {each: i for row in rows for i, each in enumerate(row)}
        for row in others:
            means = {
                each: sum(place[other] for other in neighbours[each]) / len(neighbours[each])
                if neighbours[each]
                else place[each]
                for each in row
            }
            row.sort(key=lambda each: (means[each], place[each]))
            place |= {each: i for i, each in enumerate(row)}


def _placed(
    rows: Sequence[Sequence[Bend]],
    up: Mapping[Bend, Sequence[Bend]],
    down: Mapping[Bend, Sequence[Bend]],
    sizes: Mapping[Bend, float],
) -> dict[Bend, float]:
    """Return the centres: each near the mean of its neighbours and the middle, none upon another."""
    at: dict[Bend, float] = {}
    for row in rows:
        across = -sum(sizes[each] for each in row) / 2
        for each in row:
            at[each] = across + sizes[each] / 2
            across += sizes[each]
    centred = dict(at)
    for _ in range(_SWEEPS):
        for row in (*rows, *reversed(rows)):
            wanted = []
            for each in row:
                near = [at[other] for other in (*up[each], *down[each])]
                mean = sum(near) / len(near) if near else at[each]
                wanted.append((1 - _PULL) * mean + _PULL * centred[each])
            at |= zip(row, apart(wanted, [sizes[each] for each in row]), strict=True)
    return at
