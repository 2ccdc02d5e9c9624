"""A plot is drawn once for an artifact, by the present code."""

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.assets import plots
from vpmoe_assets.build import Published
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def item(tmp_path):
    store = Store(tmp_path / "artifacts")
    record = publish(store, "vpmoe")
    return Published(record, store.directory(record))


def test_it_is_drawn_once_also_where_there_is_nothing_to_see(item):
    drawn = []

    def draw(name, picture):
        return plots.drawn_once(item, name, lambda: drawn.append(name) or picture)

    for _ in range(3):
        assert draw("curve", "![loss](data:x)") == "![loss](data:x)"
        assert draw("profile", None) is None
    assert drawn == ["curve", "profile"]


def test_other_code_draws_it_again(item, monkeypatch):
    assert plots.drawn_once(item, "curve", lambda: "old") == "old"
    monkeypatch.setattr(plots, "_code", lambda: "0" * 16)
    assert plots.drawn_once(item, "curve", lambda: "new") == "new"


def test_another_version_has_its_own(item, tmp_path):
    store = Store(tmp_path / "artifacts")
    other = publish(store, "vpmoe")
    assert plots.drawn_once(item, "curve", lambda: "one") == "one"
    assert plots.drawn_once(Published(other, store.directory(other)), "curve", lambda: "two") == "two"
