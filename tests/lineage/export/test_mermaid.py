import re

from hypothesis import given
from hypothesis import strategies as st

from tests.lineage.export.cases import digest, edge, graphs, node
from vpmoe_assets.lineage.export.mermaid import flowchart
from vpmoe_assets.lineage.graph import Graph

NODE = re.compile(r'    n\d+\["(?:[\w .,:@/-]|#\d+;|<br/>)*"\]')
EDGE = re.compile(r'    n\d+ (?:-->|-->\|"(?:[\w .,:@/-]|#\d+;)*"\||-\.->) n\d+')


@given(graphs())
def test_every_node_and_edge_is_a_line(graph):
    lines = flowchart(graph).splitlines()
    assert lines[0] == "flowchart TD"
    assert sum(bool(NODE.fullmatch(line)) for line in lines) == len(graph.nodes)
    assert sum(bool(EDGE.fullmatch(line)) for line in lines) == len(graph.edges)


@given(st.text())
def test_no_name_is_syntax(name):
    graph = Graph(digest(0), {digest(0): node(0, name), digest(1): node(1)}, (edge(0, 1, name),))
    lines = flowchart(graph).split("\n")
    assert NODE.fullmatch(lines[1])
    assert EDGE.fullmatch(lines[3])
