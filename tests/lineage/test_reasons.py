"""Causes to their roots: functions by name, from kept sources, and what made an input another one."""

import pytest

from tests.lineage.fabricate import CODE_OF_STEP, publish
from tests.lineage.test_staleness import Step
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.snapshot import pack
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.reasons import Reasons
from vpmoe_assets.lineage.record import Objects
from vpmoe_assets.lineage.staleness import standings
from vpmoe_assets.lineage.store import Store

(FILE,) = CODE_OF_STEP.sources
OLD = b"def write(rows):\n    return rows\n\n\nclass Row:\n    def text(self):\n        return 1\n"
NEW = OLD.replace(b"return 1", b"return 2")


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "artifacts")


@pytest.fixture
def tree(tmp_path):
    path = tmp_path / "project" / FILE
    path.parent.mkdir(parents=True)
    path.write_bytes(NEW)
    return SourceTree(tmp_path / "project", memory=None)


def kept(store: Store, content: bytes) -> Objects:
    return Objects(sources=ObjectStore(store.root).put(pack({FILE: content}), "the sources"))


def reasons(store, tree, steps, asset):
    return Reasons(store, standings(store, "smoke", steps), tree).of(asset)


def test_changed_functions_are_named_where_the_sources_are_kept(store, tree):
    changed = Closure((), {FILE: "d" * 64}, CODE_OF_STEP.packages)
    steps = {"a": Step("a", code=changed)}
    publish(store, "a", recipe_keys={"value": 1}, objects=kept(store, OLD))
    (cause,) = reasons(store, tree, steps, "a")
    assert cause.line() == f"code changed: {FILE}:Row.text"
    assert cause.to_dict()["definitions"] == ["Row.text"]
    ObjectStore(store.root).path(kept(store, OLD).sources).unlink()
    (cause,) = reasons(store, tree, steps, "a")
    assert cause.line() == f"code changed: {FILE}", "without them the file is named"


def test_an_input_with_other_content_is_explained_by_what_made_it_so(store, tree):
    first = publish(store, "a", recipe_keys={"value": 1}, objects=kept(store, OLD))
    b = publish(store, "b", (first,), files={"b": b"1"}, recipe_keys={"value": 1})
    publish(store, "c", (b,), recipe_keys={"value": 1})
    second = publish(store, "a", files={"x": b"2"}, recipe_keys={"value": 2}, objects=kept(store, NEW))
    newer = publish(store, "b", (second,), files={"b": b"2"}, recipe_keys={"value": 1})
    steps = {"a": Step("a", value=2), "b": Step("b", ("a",)), "c": Step("c", ("b",))}
    (cause,) = reasons(store, tree, steps, "c")
    assert (cause.kind, cause.old, cause.new) == ("input", b.version, newer.version)
    (above,) = cause.causes
    assert (above.kind, above.name, above.old, above.new) == ("input", "a", first.version, second.version)
    assert [each.line() for each in above.causes] == ["recipe value 1 → 2"]


def test_a_version_that_is_gone_leaves_its_part_unexplained(store, tree):
    first = publish(store, "a", recipe_keys={"value": 1})
    publish(store, "b", (first,), recipe_keys={"value": 1})
    publish(store, "a", files={"x": b"2"}, recipe_keys={"value": 2})
    (store.directory(first) / ".artifact.json").unlink()
    steps = {"a": Step("a", value=2), "b": Step("b", ("a",))}
    (cause,) = reasons(store, tree, steps, "b")
    assert (cause.kind, cause.causes) == ("input", ())
