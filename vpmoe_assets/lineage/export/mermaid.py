"""The graph of records as a mermaid flowchart, which code hosts and notebooks draw."""

from vpmoe_assets.lineage.export.labels import label
from vpmoe_assets.lineage.graph import Graph


def flowchart(graph: Graph) -> str:
    """Return the graph as mermaid text."""
    nodes = graph.ordered()
    names = {node.record_digest: f"n{number}" for number, node in enumerate(nodes)}
    lines = ["flowchart TD"]
    for node in nodes:
        shown = "<br/>".join(_entities(line) for line in label(node))
        lines.append(f'    {names[node.record_digest]}["{shown}"]')
    for edge in graph.edges:
        parent, child = graph.nodes[edge.parent], names[edge.child]
        role = edge.reference.role
        if edge.kind == "original":
            arrow = "-.->"
        else:
            arrow = "-->" if role == parent.asset else f'-->|"{_entities(role)}"|'
        lines.append(f"    {names[edge.parent]} {arrow} {child}")
    lines.append(f"    style {names[graph.start]} stroke-width:3px")
    lines += [
        f"    style {names[node.record_digest]} stroke-dasharray:4 3"
        for node in nodes
        if node.state != "present"
    ]
    return "\n".join(lines) + "\n"


def _entities(text: str) -> str:
    """Return text in which mermaid finds no syntax: everything but plain characters as its number."""
    return "".join(c if c.isalnum() or c in " _.,:@/-" else f"#{ord(c)};" for c in text)
