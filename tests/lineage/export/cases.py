"""Graphs without a store."""

from hypothesis import strategies as st

from vpmoe_assets.lineage.graph import Edge, Graph, Node
from vpmoe_assets.lineage.record import InputRef


def digest(number):
    return f"{number:064x}"


def node(number, asset="asset", version="20260131.1-00000000", experiment="smoke"):
    return Node(experiment, asset, version, digest(number), digest(number), "unknown", None)


def edge(parent, child, role="asset", kind="input"):
    reference = InputRef(
        asset="asset", version="1", digest=digest(parent), record_digest=digest(parent), role=role
    )
    return Edge(digest(parent), digest(child), reference, kind)


@st.composite
def graphs(draw):
    """Any graph of up to a dozen nodes whose edges go from a lower to a higher number."""
    count = draw(st.integers(1, 12))
    pairs = st.tuples(st.integers(0, count - 1), st.integers(0, count - 1)).map(sorted).map(tuple)
    edges = sorted(pair for pair in draw(st.sets(pairs, max_size=25)) if pair[0] < pair[1])
    nodes = {digest(number): node(number) for number in range(count)}
    return Graph(digest(draw(st.integers(0, count - 1))), nodes, tuple(edge(*pair) for pair in edges))
