"""The lineage of an artifact as a picture: what it came from above it, what came of it below."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

from vpmoe_assets.browse.catalog import View
from vpmoe_assets.browse.layered import Layout
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.store import Store

MOST = 80
"""Nodes of a picture; what is further away is left to the pages of its own."""
_WIDTH, _HEIGHT, _GAP, _ROW = 196, 44, 18, 78
_BEND = 22
_LONGEST = 25


@dataclass(frozen=True)
class Node:
    """One artifact of a picture.

    Attributes:
        title: First line.
        line: Second line.
        hint: What is said to whoever points at it.
        link: Relative link, or None.
        kind: Classes of the style sheet.
    """

    title: str
    line: str
    hint: str
    link: str | None
    kind: str


@dataclass(frozen=True)
class Relative:
    """An artifact of a family.

    Attributes:
        name: `experiment/asset/version`.
        head: Of its record; None where nobody knows that any more.
        present: Whether it is in the store.
    """

    name: str
    head: Head | None
    present: bool


@dataclass(frozen=True)
class Family:
    """An artifact and what is around it, by record digest.

    Attributes:
        parents: Of each that is drawn, those of them that are drawn too.
        members: All that are drawn.
        above: How many artifacts it came from.
        below: How many came of it.
    """

    parents: Mapping[str, Sequence[str]]
    members: Mapping[str, Relative]
    above: int
    below: int

    @property
    def left_out(self) -> int:
        """How many are too far away to be drawn."""
        return self.above + self.below + 1 - len(self.members)


def family(view: View, store: Store, head: Head) -> Family:
    """Return an artifact, all that it came from, and all that came of it, nearest first.

    What is gone is told from the ledger, and the way up goes on behind it.
    """

    def parents(of: Relative) -> dict[str, Relative]:
        if of.head is None:
            return {}
        found = {}
        known = dict(view.parents(of.head))
        gone = store.remembered(ref.record_digest for ref, there in known.items() if there is None)
        for reference, there in known.items():
            digest = reference.record_digest
            name = f"{of.head.experiment}/{reference.asset}/{reference.version}"
            found[digest] = Relative(name, there or gone.get(digest), there is not None)
        return found

    def children(of: Relative) -> dict[str, Relative]:
        made = view.children(of.head) if of.head is not None else ()
        return {child.record_digest: Relative(version_name(child), child, True) for child in made}

    start = Relative(version_name(head), head, True)
    above = _reached(head.record_digest, start, parents)
    below = _reached(head.record_digest, start, children)
    half = MOST // 2
    most_above = max(half, MOST - len(below))
    chosen = {head.record_digest: start, **dict(list(above.items())[:most_above])}
    chosen |= list(below.items())[: MOST - len(chosen) + 1]
    # Not drawn is what leads past the artifact: what its descendants were made from beside it.
    side = {digest: digest in below for digest in chosen} | {head.record_digest: None}
    edges: dict[str, list[str]] = {}
    for digest, each in chosen.items():
        named = [ref.record_digest for ref in each.head.inputs] if each.head is not None else []
        edges[digest] = [
            parent
            for parent in dict.fromkeys(named)
            if parent in chosen and (None in (side[digest], side[parent]) or side[digest] == side[parent])
        ]
    return Family(edges, chosen, len(above), len(below))


def picture(parents: Mapping[str, Sequence[str]], nodes: Mapping[str, Node]) -> Markup:
    """Return a graph as SVG, each node a link.

    Args:
        parents: Of each node.
        nodes: What each shows, by the same names.
    """
    layout = Layout.of(parents, node=_WIDTH + _GAP, bend=_BEND)
    width, height = layout.width + _GAP, layout.layers * _ROW + 8
    parts = [
        f'<svg class="graph" viewBox="0 0 {width:.0f} {height}" width="{width:.0f}" height="{height}" '
        f'role="img" aria-label="lineage">'
    ]
    for start, end in layout.edges:
        x1, x2 = layout.at[start] + _GAP / 2, layout.at[end] + _GAP / 2
        y1 = start[1] * _ROW + (_HEIGHT + 4 if layout.layer[start[0]] == start[1] else _HEIGHT / 2)
        y2 = end[1] * _ROW + (4 if layout.layer[end[0]] == end[1] else _HEIGHT / 2)
        middle = (y1 + y2) / 2
        parts.append(
            f'<path d="M{x1:.1f},{y1:.1f} C{x1:.1f},{middle:.1f} {x2:.1f},{middle:.1f} {x2:.1f},{y2:.1f}"/>'
        )
    for name, node in nodes.items():
        x = layout.at[name, layout.layer[name]] + _GAP / 2 - _WIDTH / 2
        y = layout.layer[name] * _ROW + 4
        box = (
            f'<g class="node {escape(node.kind)}" transform="translate({x:.1f} {y})">'
            f"<title>{escape(node.hint)}</title>"
            f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="7"/>'
            f'<text class="name" x="10" y="18">{escape(_cut(node.title))}</text>'
            f'<text x="10" y="34">{escape(node.line)}</text></g>'
        )
        parts.append(f'<a href="{escape(node.link)}">{box}</a>' if node.link else box)
    parts.append("</svg>")
    return Markup("".join(parts))


def node_of(each: Relative, link: str | None, kind: str, line: str = "") -> Node:
    """Return what the picture shows of an artifact.

    Args:
        each: The artifact.
        link: To where its node leads.
        kind: Classes of the style sheet.
        line: What stands below its name, in place of version and digest.
    """
    _, asset, version = each.name.split("/")
    short = version.rpartition("-")[0] or version
    if not each.present:
        return Node(asset, f"{short} · gone", f"{each.name}: no longer in the store", None, f"{kind} gone")
    assert each.head is not None
    line = line or f"{short} · {each.head.digest[:8]}"
    return Node(asset, line, f"{each.name}, digest {each.head.digest}", link, kind)


def _reached(
    itself: str, start: Relative, step: Callable[[Relative], Mapping[str, Relative]]
) -> dict[str, Relative]:
    """Return everything that is reached from an artifact by record digest, nearest first, without itself."""
    found: dict[str, Relative] = {}
    row = [start]
    while row:
        further = []
        for each in row:
            for digest, other in step(each).items():
                if digest not in found and digest != itself:
                    found[digest] = other
                    further.append(other)
        row = further
    return found


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"
