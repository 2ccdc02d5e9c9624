"""What small files say is read once for each of their states, and never believed for longer."""

import time

import pytest

from tests.lineage.fabricate import damage, publish
from vpmoe_assets.lineage import filememory
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.readings import Readings, files_below
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.witnesses import sightings


@pytest.fixture
def settled(monkeypatch):
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)


def test_a_file_is_read_again_when_it_was_written_to_and_what_says_nothing_is_not_remembered(
    tmp_path, settled
):
    (tmp_path / "in" / "sub").mkdir(parents=True)
    whole, broken = tmp_path / "in" / "sub" / "whole.x", tmp_path / "in" / "sub" / "broken.x"
    for path in (whole, broken, tmp_path / "in" / "sub" / "other", tmp_path / "in" / "above.x"):
        path.write_text("1")
    read = []

    def text(path):
        read.append(path)
        return None if path == broken else path.read_text()

    def said():
        time.sleep(0.02)
        read.clear()
        files = dict(files_below(tmp_path / "in", 1, ".x"))
        assert files.keys() == {whole, broken}
        return Readings(tmp_path / "r.sqlite")(files, text)

    assert said() == {whole: "1"}
    assert set(read) == {whole, broken}
    assert said() == {whole: "1"}
    assert read == [broken]
    whole.write_text("2")
    assert said() == {whole: "2"}
    assert list(files_below(tmp_path / "none", 1)) == []


def test_statements_that_are_altered_later_are_told_and_so_is_who_may_have_signed(tmp_path, settled):
    store = Store(tmp_path / "artifacts")
    record = publish(store, "a", checks=[{"name": "x", "passed": True}])
    index = Index(store.root / "index.duckdb")
    index.update(store)
    for _ in range(2):
        time.sleep(0.02)
        heard = sightings(store, index, "smoke", store.readings)
        assert {each.witness for each in heard.sightings} == {"the index", "the ledger", "a statement"}
        assert (list(heard.unheard), heard.signed) == ([], set())
    (path,) = (store.root / ".statements").rglob("*.jsonl")
    damage(path, 30)
    heard = sightings(Store(store.root), index, "smoke", store.readings)
    assert [each.kind for each in heard.unheard] == ["statement"]
    assert heard.signed == {record.record_digest}
