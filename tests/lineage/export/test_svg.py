import xml.etree.ElementTree as ET

from hypothesis import given
from hypothesis import strategies as st

from tests.lineage.export.cases import digest, edge, graphs, node
from vpmoe_assets.lineage.export.svg import draw
from vpmoe_assets.lineage.graph import Graph

SVG = "{http://www.w3.org/2000/svg}"


@given(graphs())
def test_a_picture_is_well_formed_and_has_every_node_and_edge(graph):
    root = ET.fromstring(draw(graph))
    boxes = [each for each in root.iter(f"{SVG}g") if "lineage-node" in each.get("class")]
    assert len(boxes) == len(graph.nodes)
    assert sum("lineage-start" in each.get("class") for each in boxes) == 1
    assert len(list(root.iter(f"{SVG}path"))) == len(graph.edges)


@given(st.text(), st.text())
def test_no_name_leaves_its_place(name, address):
    """Names of a store are plain; those of a record that somebody forged may be anything."""
    graph = Graph(digest(0), {digest(0): node(0, name, name, name), digest(1): node(1)}, (edge(0, 1, name),))
    drawn = draw(graph, href=lambda node: address, remarks={digest(0): name}, standalone=False)
    root = ET.fromstring(drawn)
    assert {each.tag for each in root.iter()} == {
        f"{SVG}{tag}" for tag in ("svg", "title", "g", "rect", "text", "path", "a")
    }
    assert len(list(root.iter(f"{SVG}a"))) == 2
    assert not any(name.startswith("on") for each in root.iter() for name in each.attrib)


def test_nodes_lead_where_the_page_says_and_say_what_became_of_them():
    graph = Graph(digest(0), {digest(0): node(0, "a<b"), digest(1): node(1)}, ())
    drawn = draw(graph, href=lambda n: "/x?a=1&b=2" if n.asset == "a<b" else None)
    (link,) = ET.fromstring(drawn).iter(f"{SVG}a")
    assert link.get("href") == "/x?a=1&b=2"
    assert [text.text for text in link.iter(f"{SVG}text")] == [
        "a<b",
        "20260131.1-00000000",
        "unknown to the store",
    ]
    assert "style=" not in drawn, "pages forbid it"
