"""The store as the pages see it: at once when it changes, and of one moment where that is asked for."""

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.browse.catalog import Catalog
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path):
    store = Store(tmp_path / "artifacts")
    publish(store, "a")
    return store


def versions(catalog):
    return len(catalog.view("smoke").assets["a"].heads)


def test_a_view_is_the_same_value_until_something_is_published(store):
    catalog = Catalog(store)
    before = catalog.view("smoke")
    assert catalog.view("smoke") is before
    publish(store, "a", files={"x": b"other"})
    assert len(before.assets["a"].heads) == 1
    assert versions(catalog) == 2


def test_pages_of_one_moment_do_not_see_what_comes_meanwhile(store):
    catalog = Catalog(store)
    with catalog.still():
        assert catalog.is_still
        first, whole, remarks = catalog.view("smoke"), catalog.whole_view("smoke"), catalog.remarks
        publish(store, "a", files={"x": b"other"})
        publish(store, "b")
        assert catalog.view("smoke") is first
        assert catalog.whole_view("smoke") is whole
        assert catalog.remarks is remarks
    assert not catalog.is_still
    assert versions(catalog) == 2
    assert set(catalog.whole_view("smoke").assets) == {"a", "b"}


def test_an_error_among_pages_of_one_moment_ends_the_moment(store):
    catalog = Catalog(store)
    with pytest.raises(KeyError), catalog.still():
        catalog.view("smoke").assets["nonesuch"]
    publish(store, "a", files={"x": b"other"})
    assert versions(catalog) == 2


def test_each_moment_is_a_new_one(store):
    catalog = Catalog(store)
    with catalog.still():
        assert versions(catalog) == 1
    publish(store, "a", files={"x": b"other"})
    with catalog.still():
        assert versions(catalog) == 2
