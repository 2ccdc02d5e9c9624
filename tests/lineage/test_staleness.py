"""States and causes of fabricated artifacts, under steps that say what present code would make."""

import shutil
from dataclasses import dataclass, field
from typing import Any

import pytest

from tests.lineage.fabricate import CODE_OF_STEP, publish
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.errors import DataError
from vpmoe_assets.lineage.acceptance import Named, accepting
from vpmoe_assets.lineage.fingerprint import recipe_fingerprint
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.remembered import Present, RememberedStep, StepMemory
from vpmoe_assets.lineage.staleness import standings, unfolded
from vpmoe_assets.lineage.store import Store


@dataclass
class Step:
    """A step of a recipe with one key, `value`."""

    asset: str
    inputs: tuple[str, ...] = ()
    value: int = 1
    code: Closure = CODE_OF_STEP
    partial: tuple[str, ...] = ()
    outside: dict[str, str] = field(default_factory=dict)

    def fingerprint_of(self, digests) -> tuple[str, dict[str, Any]]:
        if "unreadable" in self.outside:
            raise DataError("sources.synth.path: is no directory")
        recipe = {"asset": self.asset, "value": self.value}
        return recipe_fingerprint(recipe, self.code, {**digests, **self.outside})


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def chain(store):
    """a → b → c, and what makes them."""
    a = publish(store, "a", recipe_keys={"value": 1})
    b = publish(store, "b", (a,), recipe_keys={"value": 1})
    publish(store, "c", (b,), recipe_keys={"value": 1})
    return {"a": Step("a"), "b": Step("b", ("a",)), "c": Step("c", ("b",))}


def told(store, steps, **options):
    return {asset: found.summary for asset, found in standings(store, "smoke", steps, **options).items()}


FRESH = {"a": "fresh", "b": "fresh", "c": "fresh"}


def test_what_present_code_would_make_the_same_is_fresh(store, chain):
    assert told(store, chain) == FRESH


def test_each_kind_of_difference_is_named_and_stale_inputs_are_told_to_the_end(store, chain):
    other = Closure((), {"vpmoe_assets/synth.py": "d" * 64, "new.py": "e" * 64}, {"pyarrow": "22.0.0"})
    chain["a"] = Step("a", value=2, code=other)
    found = standings(store, "smoke", chain)
    assert [cause.line() for cause in found["a"].causes] == [
        "recipe value 1 → 2",
        "code added: new.py",
        "code changed: vpmoe_assets/synth.py",
        "package pyarrow 21.0.0 → 22.0.0",
    ]
    assert found["a"].summary == "stale: recipe value 1 → 2; code added: new.py (and 2 more)"
    assert (found["b"].summary, found["c"].summary) == ("stale: a is stale", "stale: b is stale")
    assert [found[asset].marked for asset in "abc"] == [True, False, False]
    (cause,) = unfolded(found, "c")
    assert [each.name for each in cause.causes] == ["a"]
    assert cause.causes[0].causes == found["a"].causes
    assert cause.to_dict()["causes"][0]["causes"][0] == {
        "kind": "recipe",
        "name": "value",
        "old": "1",
        "new": "2",
        "text": "recipe value 1 → 2",
    }


def test_a_shared_root_is_unfolded_once(store):
    a = publish(store, "a", recipe_keys={"value": 1})
    b = publish(store, "b", (a,), recipe_keys={"value": 1})
    publish(store, "c", (b, a), recipe_keys={"value": 1})
    steps = {"c": Step("c", ("b", "a")), "b": Step("b", ("a",)), "a": Step("a", value=2)}
    found = standings(store, "smoke", steps)
    below_b, repeated = unfolded(found, "c")
    assert [cause.name for cause in below_b.causes] == ["a"]
    assert (repeated.name, repeated.causes, repeated.repeated) == ("a", (), True)


def test_an_input_with_other_content_is_a_cause_and_with_the_same_content_none(store, chain):
    publish(store, "a", recipe_keys={"value": 1})
    assert told(store, chain) == FRESH
    newer = publish(store, "a", files={"x": b"1"}, recipe_keys={"value": 2})
    chain["a"] = Step("a", value=2)
    assert told(store, chain) == FRESH | {
        "b": f"stale: a is now {newer.version}",
        "c": "stale: b is stale",
    }


def test_inputs_that_are_gone_added_removed_or_partial(store, chain):
    chain["b"] = Step("b", ("a", "d"), partial=("e",))
    assert told(store, chain)["b"] == "unknown: d is not in the store"
    publish(store, "e", recipe_keys={"value": 1})
    publish(store, "d", recipe_keys={"value": 1})
    told_now = told(store, chain)
    assert told_now["b"] == "stale: d is an input now, and was none; e is an input now, and was none"
    assert told_now["d"] == "unknown: nothing in the experiment makes it"
    chain["b"] = Step("b", ())
    assert told(store, chain)["b"] == "stale: a was an input, and is none now"


def test_a_missing_asset_names_what_is_missing_above_it(store):
    steps = {"a": Step("a"), "b": Step("b", ("a",))}
    assert told(store, steps) == {"a": "missing", "b": "missing: a is not in the store"}


def test_damage_and_failed_checks_come_before_staleness_and_do_not_hide_it(store, chain):
    chain["a"], chain["b"] = Step("a", value=2), Step("b", ("a",), value=2)
    bad = {"name": "aligned", "passed": False, "description": "3 of 4"}
    publish(store, "a", recipe_keys={"value": 1}, checks=[bad])
    b = store.find("smoke", "b")
    (store.payload(b) / "data.bin").unlink()
    found = standings(store, "smoke", chain)
    assert found["a"].summary == "blocked: check aligned: 3 of 4; recipe value 1 → 2"
    assert found["b"].state == "damaged"
    assert found["b"].causes[0].line() == "payload/data.bin missing (300 bytes expected)"
    assert found["b"].stale
    assert found["c"].summary == "stale: b is stale"


def test_a_record_that_cannot_be_read_is_damage(store, chain):
    path = store.directory(store.find("smoke", "a")) / RECORD_NAME
    path.chmod(0o644)
    path.write_text("{")
    found = standings(store, "smoke", chain)
    assert found["a"].state == "damaged"
    assert "not a JSON record" in found["a"].summary
    assert found["b"].state == "unknown"


def test_an_input_that_was_removed_makes_its_children_unknown(store, chain):
    shutil.rmtree(store.directory(store.find("smoke", "a")))
    assert told(store, chain) == {
        "a": "missing",
        "b": "unknown: a is not in the store",
        "c": "fresh",
    }


def test_a_folder_outside_is_compared_and_one_that_cannot_be_read_leaves_it_unknown(store):
    publish(store, "a", recipe_keys={"value": 1})
    step = Step("a", outside={"external:folder": "f" * 64})
    assert told(store, {"a": step})["a"] == "stale: the content of external:folder has changed"
    step.outside = {"unreadable": ""}
    assert told(store, {"a": step})["a"] == "unknown: sources.synth.path: is no directory"


def test_what_a_person_accepted_covers_the_difference(store, chain):
    chain["a"] = Step("a", value=2)
    record = store.find("smoke", "a")
    _, payload = chain["a"].fingerprint_of({})
    said = accepting(record, payload, (), reason="no matter", shown_by={}, named=Named(recipe=["value"]))
    store.statements.append(said)
    found = standings(store, "smoke", chain)
    assert [found[asset].state for asset in "abc"] == ["fresh"] * 3
    assert found["a"].covered.line().startswith("accepted as the same by ")
    assert "recipe value 1 → 2" in found["a"].covered.line()


def test_under_a_strict_toolchain_another_torch_is_a_cause(store, chain, monkeypatch):
    monkeypatch.setattr(
        "vpmoe_assets.lineage.staleness.toolchain_difference", lambda _: {"torch": ("2.11.0", "2.12.0")}
    )
    assert told(store, chain) == FRESH
    found = told(store, chain, strict=True)
    assert found["a"] == "stale: strict_toolchain: torch 2.11.0 → 2.12.0"


def test_steps_are_remembered_by_key_and_nonsense_is_not(tmp_path):
    step = RememberedStep("b", {"lr": 1e-3, "layers": [1, 2]}, CODE_OF_STEP, ("a",), ("c",))
    nowhere = StepMemory(tmp_path / "nowhere" / ".work" / "steps.json")
    nowhere.keep("k", Present("smoke", False, {}))
    assert not (tmp_path / "nowhere").exists(), "a question makes no store"
    memory = StepMemory(tmp_path / ".work" / "steps.json")
    assert memory.recall("k") is None
    memory.keep("k", Present("smoke", True, {"b": step}))
    memory.keep("other", Present("smoke", False, {}))
    found = memory.recall("k")
    assert found == Present("smoke", True, {"b": step})
    assert found.steps["b"].fingerprint_of({"a": "0"}) == step.fingerprint_of({"a": "0"})
    for nonsense in ("[]", "{", '{"k": {"steps": 1}}'):
        (tmp_path / ".work" / "steps.json").write_text(nonsense)
        assert memory.recall("k") is None
