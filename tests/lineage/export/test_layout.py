from itertools import pairwise

from hypothesis import given

from tests.lineage.export.cases import digest, edge, graphs, node
from vpmoe_assets.lineage.export.layout import lay_out
from vpmoe_assets.lineage.graph import Graph


@given(graphs())
def test_nodes_stand_apart_and_below_what_they_came_from(graph):
    layout = lay_out(graph)
    assert layout.places.keys() == graph.nodes.keys()
    rows = {}
    for place, row in layout.places.values():
        rows.setdefault(row, []).append(place)
        assert -1e-9 <= place <= layout.columns - 1 + 1e-9
        assert 0 <= row < layout.rows
    assert all(b - a > 1 - 1e-9 for row in rows.values() for a, b in pairwise(sorted(row)))
    for each, way in zip(graph.edges, layout.ways, strict=True):
        assert way[0] == layout.places[each.parent]
        assert way[-1] == layout.places[each.child]
        assert [row for _, row in way] == list(range(way[0][1], way[-1][1] + 1))
        for place, row in way[1:-1]:  # past the nodes of its row, not through them
            assert all(abs(place - other) > 0.5 for other in rows.get(row, ()))
    assert lay_out(graph) == layout


def test_a_chain_stands_in_one_column_and_a_source_beside_what_first_used_it():
    nodes = {digest(n): node(n) for n in range(5)}
    graph = Graph(digest(3), nodes, (edge(0, 1), edge(1, 2), edge(2, 3), edge(4, 3)))
    layout = lay_out(graph)
    assert [layout.places[digest(n)][1] for n in range(5)] == [0, 1, 2, 3, 2]


def test_a_forged_circle_is_drawn_too():
    nodes = {digest(n): node(n) for n in range(2)}
    assert len(lay_out(Graph(digest(0), nodes, (edge(0, 1), edge(1, 0)))).places) == 2
