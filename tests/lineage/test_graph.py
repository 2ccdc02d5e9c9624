import json
import shutil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage.graph import (
    Edge,
    Graph,
    Node,
    all_records,
    ancestors,
    both_ways,
    descendants,
)
from vpmoe_assets.lineage.record import InputRef, Origin
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def origin(record):
    return Origin(
        experiment=record.experiment,
        asset=record.asset,
        version=record.version,
        record_digest=record.record_digest,
    )


def reference(digest):
    return InputRef(asset="x", version="1", digest=digest, record_digest=digest, role="x")


def unknown(digest):
    return Node("smoke", "x", "1", digest, digest, "unknown", None)


def told(lines):
    return [(line.depth, line.node.asset, line.node.state, line.repeated) for line in lines]


def test_the_tree_unfolds_shared_ancestors_once_and_goes_on_behind_what_is_gone(store):
    a = publish(store, "a")
    b = publish(store, "b", (a,))
    c = publish(store, "c", (b, a))
    assert told(ancestors(store, c).tree()) == [
        (0, "c", "present", False),
        (1, "b", "present", False),
        (2, "a", "present", False),
        (1, "a", "present", True),
    ]
    shutil.rmtree(store.directory(b))
    assert told(ancestors(store, c).tree())[1:3] == [(1, "b", "gone", False), (2, "a", "present", False)]
    store.ledger.path(b.record_digest).unlink()
    assert told(ancestors(store, c).tree())[1:] == [(1, "b", "unknown", False), (1, "a", "present", False)]


def test_descendants_are_found_through_what_is_gone_and_by_record_not_by_name(store):
    a = publish(store, "a")
    b = publish(store, "b", (a,))
    c = publish(store, "c", (b, a))
    publish(store, "b", (publish(store, "a"),))
    shutil.rmtree(store.directory(b))
    graph = descendants(store, a)
    assert told(graph.tree(down=True)) == [
        (0, "a", "present", False),
        (1, "c", "present", False),
        (1, "b", "gone", False),
        (2, "c", "present", True),
    ]
    assert [node.version for node in graph.ordered()] == [a.version, b.version, c.version]
    shutil.rmtree(store.directory(a))
    assert told(descendants(store, a).tree(down=True))[0] == (0, "a", "gone", False)


def test_a_record_that_repeats_another_is_reached_where_originals_are_asked_for(store):
    a = publish(store, "a", recipe_keys={})
    again = publish(
        store, "a", recipe_keys={"k": 1}, experiment="other", original=origin(a), files={"x": b"1"}
    )
    assert set(ancestors(store, again).nodes) == {again.record_digest}
    up = ancestors(store, again, originals=True)
    assert [(edge.kind, edge.parent) for edge in up.edges] == [("original", a.record_digest)]
    assert up.nodes[a.record_digest].experiment == "smoke"
    down = descendants(store, a, originals=True)
    assert set(down.nodes) == {a.record_digest, again.record_digest}
    assert set(descendants(store, a).nodes) == {a.record_digest}


def test_records_at_hand_give_the_same_as_the_store(store):
    a = publish(store, "a")
    b = publish(store, "b", (a,))
    c = publish(store, "c", (b, a))
    shutil.rmtree(store.directory(b))
    known = all_records(store)
    for record in (a, c):
        for walk in (ancestors, descendants, both_ways):
            told, found = walk(store, record), walk(store, record, known=known)
            assert (told.nodes, set(told.edges)) == (found.nodes, set(found.edges))
    assert [node.state for node in both_ways(store, a, known=known).nodes.values()].count("gone") == 1


def test_both_ways_joins_them_and_leaves_out_what_descendants_came_from_beside_it(store):
    a = publish(store, "a")
    b = publish(store, "b", (a,))
    other = publish(store, "other")
    c = publish(store, "c", (b, other), metrics={"loss": 1.5, "steps": 9, "valid_loss": None})
    graph = both_ways(store, b)
    assert [node.asset for node in graph.ordered()] == ["a", "b", "c"]
    assert len(graph.edges) == 2
    (told_of_c,) = [node for node in graph.to_dict()["nodes"] if node["asset"] == "c"]
    assert told_of_c["metrics"] == {"loss": 1.5}
    assert told_of_c["record_digest"] == c.record_digest
    json.dumps(graph.to_dict())


@given(st.lists(st.sets(st.integers(0, 11)), min_size=2, max_size=12), st.data())
def test_any_graph_is_walked_as_its_transitive_closure(inputs, data):
    count = len(inputs)
    names = [f"{number:064x}" for number in range(count)]
    pairs = {(parent, child) for child, parents in enumerate(inputs) for parent in parents if parent < child}
    edges = tuple(
        Edge(names[parent], names[child], reference(names[parent])) for parent, child in sorted(pairs)
    )
    start = data.draw(st.integers(0, count - 1))
    graph = Graph(names[start], {name: unknown(name) for name in names}, edges)
    closure = set(pairs)
    for middle in range(count):
        closure |= {
            (a, b) for a in range(count) for b in range(count) if {(a, middle), (middle, b)} <= closure
        }
    most = data.draw(st.integers(1, count + 1))
    near = graph.nearest(most)
    assert len(near.nodes) == min(most, graph.above + graph.below + 1)
    assert {edge for edge in graph.edges if {edge.parent, edge.child} <= near.nodes.keys()} == set(near.edges)
    up = {line.node.record_digest for line in graph.tree()}
    assert (len(up) - 1, names[start] in near.nodes) == (graph.above, True)
    down = {line.node.record_digest for line in graph.tree(down=True)}
    assert up == {names[start], *(names[a] for a, b in closure if b == start)}
    assert down == {names[start], *(names[b] for a, b in closure if a == start)}
    assert len([line for line in graph.tree() if not line.repeated]) == len(up)
    position = {node.record_digest: number for number, node in enumerate(graph.ordered())}
    assert all(position[edge.parent] < position[edge.child] for edge in edges)
