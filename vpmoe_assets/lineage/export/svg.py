"""A picture of the graph of records: SVG, from nothing but the graph.

It needs no program and no style sheet: shapes have their looks as attributes, in `currentColor`, so that a
page that embeds it gives it its own colours, and classes (`lineage-node`, `lineage-name`, `lineage-start`,
`lineage-gone`, `lineage-accepted`, `lineage-edges`) by which a page may say more.
"""

import re
from collections.abc import Callable, Mapping
from xml.sax.saxutils import escape, quoteattr

from vpmoe_assets.lineage.export.labels import label
from vpmoe_assets.lineage.export.layout import lay_out
from vpmoe_assets.lineage.graph import Graph, Node

_WIDTH, _HEIGHT = 232.0, 62.0
"""Of a node."""
_BESIDE, _BETWEEN = 24.0, 38.0
"""Gaps."""
_MARGIN = 16.0
_FITS = 1500.0
"""A picture that is no wider may be made to fit a page, and is read there."""
_LONGEST = 33
"""Characters of a line in a node."""
_FORBIDDEN = re.compile("[^\\t\\n\\r\\x20-\\ud7ff\\ue000-\\ufffd\\U00010000-\\U0010ffff]")
"""Characters that XML 1.0 cannot hold, escaped or not."""
_ACCENT = "#2f6fde"


def draw(
    graph: Graph,
    *,
    href: Callable[[Node], str | None] | None = None,
    remarks: Mapping[str, str] | None = None,
    kind: Callable[[Node], str] | None = None,
    standalone: bool = True,
) -> str:
    """Return the graph as SVG.

    Args:
        graph: To be drawn.
        href: The address that a node leads to, or None.
        remarks: By record digest: by whose word an artifact counts; the node is marked, and says so.
        kind: More classes of a node, for the page's style sheet.
        standalone: A file of its own, on white; else a piece for a page of HTML, in the page's colours.
    """
    remarks = remarks or {}
    layout = lay_out(graph)
    across, down = _WIDTH + _BESIDE, _HEIGHT + _BETWEEN
    width = layout.columns * across - _BESIDE + 2 * _MARGIN
    height = layout.rows * down - _BETWEEN + 2 * _MARGIN

    def left(place: float) -> float:
        return _MARGIN + place * across

    def top(row: int) -> float:
        return _MARGIN + row * down

    start = graph.nodes[graph.start]
    title = f"Lineage of {start.experiment}/{start.asset}@{start.version}"
    colour = ' color="#1f2328"' if standalone else ""
    fits = "" if standalone or width > _FITS else " lineage-fits"
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" class="lineage{fits}" role="img" width="{width:.0f}"'
        f' height="{height:.0f}" viewBox="0 0 {width:.0f} {height:.0f}"{colour}'
        ' font-family="system-ui, sans-serif" font-size="12">',
        f"<title>{_text(title)}</title>",
    ]
    if standalone:
        parts.append(f'<rect width="{width:.0f}" height="{height:.0f}" fill="#ffffff"/>')
    # Opaque in a group that is not: where edges share a way, it is no darker.
    parts.append(
        '<g class="lineage-edges" fill="none" stroke="currentColor" stroke-width="1.4" opacity="0.45">'
    )
    for edge, way in zip(graph.edges, layout.ways, strict=True):
        # Through a row straight down, so that only the gaps between rows are crossed.
        points = [
            (left(place) + _WIDTH / 2, y) for place, row in way for y in (top(row), top(row) + _HEIGHT)
        ][1:-1]
        told = edge.reference.role if edge.kind == "input" else "whose files it names again"
        dashed = ' stroke-dasharray="5 4"' if edge.kind == "original" else ""
        parts.append(f'<path d="{_curve(points)}"{dashed}><title>{_text(told)}</title></path>')
    parts.append("</g>")
    for node in graph.ordered():
        place, row = layout.places[node.record_digest]
        more = "" if kind is None else kind(node)
        drawn = _box(node, left(place), top(row), node is start, remarks.get(node.record_digest), more)
        address = None if href is None else href(node)
        parts.append(drawn if address is None else f"<a href={_attribute(address)}>{drawn}</a>")
    return "\n".join([*parts, "</svg>"]) + "\n"


def _box(node: Node, x: float, y: float, start: bool, remark: str | None, more: str) -> str:
    present = node.state == "present"
    classes = "lineage-node"
    classes += " lineage-start" * start + " lineage-gone" * (not present) + " lineage-accepted" * bool(remark)
    classes += f" {more}" * bool(more)
    looks = f'stroke="{_ACCENT}" stroke-width="2"' if start else 'stroke="currentColor" stroke-opacity="0.6"'
    looks += "" if present else ' stroke-dasharray="4 3"'
    told = [f"{node.experiment}/{node.asset}@{node.version}", f"content {node.digest}"]
    told += [f"record {node.record_digest}", *([remark] if remark else [])]
    lines = label(node)
    texts = [
        f'<text x="{x + 12:.1f}" y="{y + 20 + 17 * number:.1f}" fill="currentColor"{_look(number)}>'
        f"{_text(_cut(line))}</text>"
        for number, line in enumerate(lines)
    ]
    if remark:
        right = f'x="{x + _WIDTH - 12:.1f}" y="{y + 20:.1f}" text-anchor="end"'
        texts.append(f'<text {right} fill="currentColor" font-style="italic">accepted</text>')
    identity = ' id="this"' if start else ""
    return (
        f"<g{identity} class={_attribute(classes)}><title>{_text(chr(10).join(told))}</title>"
        f'<rect x="{x:.1f}" y="{y:.1f}" width="{_WIDTH:.0f}" height="{_HEIGHT:.0f}" rx="7"'
        f' fill="currentColor" fill-opacity="{0.05 if present else 0.01}" {looks}/>'
        f"{''.join(texts)}</g>"
    )


def _look(number: int) -> str:
    return ' class="lineage-name" font-weight="600" font-size="13"' if number == 0 else ' fill-opacity="0.75"'


def _curve(points: list[tuple[float, float]]) -> str:
    """Return a smooth path through points, each of which it leaves and enters straight down."""
    (x, y), *others = points
    path = f"M{x:.1f} {y:.1f}"
    for to_x, to_y in others:
        middle = (y + to_y) / 2
        path += f"C{x:.1f} {middle:.1f} {to_x:.1f} {middle:.1f} {to_x:.1f} {to_y:.1f}"
        x, y = to_x, to_y
    return path


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 1]}…"


def _text(text: str) -> str:
    return escape(_FORBIDDEN.sub("�", text))


def _attribute(text: str) -> str:
    return quoteattr(_FORBIDDEN.sub("�", text))
