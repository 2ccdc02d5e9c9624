"""The lineage of an artifact as a picture of which each node leads to its own."""

from markupsafe import Markup

from vpmoe_assets.browse.catalog import View
from vpmoe_assets.browse.links import Links, page_of
from vpmoe_assets.lineage.export.svg import draw
from vpmoe_assets.lineage.graph import Graph, Node
from vpmoe_assets.lineage.remarks import Remarks


def lineage_picture(remarks: Remarks, view: View, graph: Graph, links: Links) -> Markup:
    """Return a graph as SVG for a page: nodes are links, what was superseded or accepted is marked.

    Args:
        remarks: What was said of the records.
        view: Of the experiment.
        graph: To be drawn.
        links: From the page.
    """

    def href(node: Node) -> str | None:
        return links.to(page_of(node, "lineage")) if node.state == "present" else None

    def kind(node: Node) -> str:
        return "lineage-old" if node.state == "present" and not view.is_latest(node) else ""

    said = {
        digest: "\n".join(remark.line() for remark in remarks.own(node.head))
        for digest, node in graph.nodes.items()
        if node.head is not None
    }
    own = {digest: lines for digest, lines in said.items() if lines}
    # `draw` escapes all that comes from records.
    return Markup(draw(graph, href=href, remarks=own, kind=kind, standalone=False))
