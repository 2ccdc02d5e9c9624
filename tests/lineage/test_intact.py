"""A version found intact is passed over while its directory is in that state, and never longer."""

import os
import shutil
import time

import pytest

from tests.lineage.fabricate import publish
from vpmoe_assets.lineage import filememory, intact
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.treestate import TreeState, states_of
from vpmoe_assets.lineage.verify import Look, verify_experiment


@pytest.fixture
def store(tmp_path, monkeypatch):
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)
    return Store(tmp_path / "artifacts")


class Verifying:
    """Verifies an experiment, and knows which files were read for it."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.index = Index(store.root / "index.duckdb")
        self.index.update(store)
        self.read: list[str] = []

    def __call__(self) -> list[tuple[str, str, str]]:
        def hasher(files):
            self.read += [file.name for file in files]
            return self.store.hasher(files)

        time.sleep(0.02)  # for the clock of the file system
        self.read = []
        done = verify_experiment(self.store, self.index, "smoke", Look(hasher, self.store.states()))
        return [(each.severity, each.kind, each.path) for each in done.found]


def test_what_was_collected_is_noted_each_time_and_the_rest_is_not_read_again(store):
    record = publish(store, "model", run={"log.txt": b"log"})
    gone = publish(store, "data")
    child = publish(store, "scores", (gone, record))
    verify = Verifying(store)
    assert verify() == []
    assert len(verify.read) == 7
    store.statements.append(Statement.about(record, "collected", {"areas": ["run"]}))
    store.statements.append(Statement.about(gone, "collected"))
    (store.directory(record) / "run" / "log.txt").unlink()
    shutil.rmtree(store.directory(gone))
    notes = [("note", "missing", "run"), ("note", "ancestor", ".artifact.json")]
    assert sorted(verify()) == sorted(notes)
    assert len(verify.read) == 2, "the version without its log"
    assert sorted(verify()) == sorted(notes)
    assert verify.read == []
    store.statements.append(Statement.about(record, "restored", {"lost": []}))
    assert ("problem", "missing", "run/log.txt") in verify(), "what is said now counts"
    assert child.inputs


def test_a_file_that_changed_in_the_moment_of_the_look_is_looked_at_again_however_late_it_is_remembered(
    store, monkeypatch
):
    record = publish(store, "model")
    before = TreeState.of(store.directory(record))
    monkeypatch.setattr(filememory, "_SETTLED_NS", 10**12)
    fresh = TreeState.of(store.directory(record))
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)
    assert (before.digest, before.files, fresh.quiet) == (fresh.digest, 3, False)
    head = {store.directory(record): store.latest("smoke", "model")}
    states = store.states()
    states.keep([(store.directory(record), record, fresh, [])])
    assert states.unchanged(head) == {}
    states.keep([(store.directory(record), record, before._replace(quiet=True), [])])
    assert list(states.unchanged(head)) == [store.directory(record)]


@pytest.mark.parametrize("change", ["content", "exchange", "rename", "mode", "extra", "link"])
def test_every_change_of_a_name_or_a_file_makes_another_state(tmp_path, change):
    tree = tmp_path / "tree"
    (tree / "sub").mkdir(parents=True)
    one, two = tree / "one", tree / "sub" / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"2")
    for path in (one, two):
        os.utime(path, ns=(1, 1))
    before = TreeState.of(tree)
    assert TreeState.of(tree) == before
    time.sleep(0.02)
    if change == "content":
        one.write_bytes(b"3")
        os.utime(one, ns=(1, 1))
    elif change == "exchange":
        one.rename(tmp_path / "aside")
        two.rename(one)
        (tmp_path / "aside").rename(two)
    elif change == "rename":
        one.rename(tree / "other")
    elif change == "mode":
        one.chmod(0o600)
    elif change == "extra":
        (tree / "sub" / "empty").mkdir()
    else:
        one.unlink()
        one.symlink_to("sub/two")
    assert TreeState.of(tree).digest != before.digest


def test_many_files_are_looked_at_by_several_processes_and_found_alike(store, monkeypatch):
    records = [publish(store, "model") for _ in range(3)]
    places = [os.fspath(store.directory(record)) for record in records] + [os.fspath(store.root / "none")]
    *alone, none = states_of(places)
    *together, nothing = states_of(places, workers=2)
    assert [each[:2] for each in together] == [each[:2] for each in alone]
    assert nothing is none is None
    monkeypatch.setattr(intact, "_MANY", 0)
    asked = []
    monkeypatch.setattr(intact, "states_of", lambda found, workers: asked.append(workers) or states_of(found))
    verify = Verifying(store)
    verify()
    verify_experiment(store, verify.index, "smoke", Look(store.hasher, store.states(workers=2)))
    assert asked[-1] == 2
