import shutil

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage.graph import ancestry, stale_reasons
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


def latest(store):
    return {asset: store.latest("smoke", asset) for asset in store.assets("smoke")}


def test_the_tree_unfolds_shared_ancestors_once_and_shows_missing_ones(store):
    a = publish(store, "a")
    b = publish(store, "b", (a,))
    c = publish(store, "c", (b, a))
    lines = [(n.depth, n.reference.asset, n.head is not None, n.repeated) for n in ancestry(store, c)]
    assert lines == [
        (0, "c", True, False),
        (1, "b", True, False),
        (2, "a", True, False),
        (1, "a", True, True),
    ]
    shutil.rmtree(store.directory(a))
    assert [(n.reference.asset, n.head is not None) for n in ancestry(store, c)][2] == ("a", False)


def test_an_asset_is_stale_when_anything_it_came_from_has_other_content_now(store):
    a = publish(store, "a")
    b = publish(store, "b", (a,))
    publish(store, "c", (b,))
    publish(store, "other")
    assert stale_reasons(latest(store)) == {}
    publish(store, "a")
    assert stale_reasons(latest(store)) == {}, "the same bytes again make nothing stale"
    newer = publish(store, "a", files={"data.bin": b"new"})
    assert stale_reasons(latest(store)) == {"b": f"a is now {newer.version}", "c": "b is stale"}
    b = publish(store, "b", (newer,), files={"x": b"1"})
    assert stale_reasons(latest(store)) == {"c": f"b is now {b.version}"}
