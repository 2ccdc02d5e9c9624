"""Two artifacts side by side: what differs is named with both values, and nothing else is."""

import json
import subprocess

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lineage.fabricate import publish
from vpmoe_assets.codebase.snapshot import pack
from vpmoe_assets.lineage.code_changes import unified
from vpmoe_assets.lineage.comparison import NumberChange, compare, parting
from vpmoe_assets.lineage.designation import Group, before, designated
from vpmoe_assets.lineage.errors import ArtifactMissing, ComparisonError
from vpmoe_assets.lineage.group_comparison import compare_groups
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import Objects
from vpmoe_assets.lineage.store import Store

RUN = "3158a0c1-3cae-42c7-802e-5bcee8cdb4ac"


def curve(*losses: float) -> bytes:
    points = [{"step": n, "loss": loss, "step_ms": 3.0 + loss} for n, loss in enumerate(losses)]
    return "".join(json.dumps(point) + "\n" for point in points).encode()


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    """Two trainings that differ in one recipe value, in one function, one package, and all that follows."""
    store = Store(tmp_path_factory.mktemp("pair") / "artifacts")
    objects = ObjectStore(store.root)
    data = publish(store, "synth", recipe_keys={})
    sides = []
    for number, lr in enumerate((0.002, 0.004)):
        code = {
            "trainer/a.py": f"def step():\n    return {number}\n".encode(),
            "trainer/b.py": b"same\n",
            f"trainer/new_{number}.py": b"x = 1",
        }
        packages = [{"name": "numpy", "version": f"2.{number}", "record_sha256": None}]
        sides.append(
            publish(
                store,
                "vpmoe_stage1",
                (data,),
                recipe_keys={"training": {"optimizer": {"lr": lr, "eps": 1e-8}}},
                files={"model.safetensors": bytes([number]) * 10, "config.json": b"{}"},
                run={"metrics.jsonl": curve(5.0, 4.0, 3.0 + number)},
                metrics={"loss": 3.0 + number, "train_seconds": 28.0 + number, "steps": 3},
                details={"heldout": {"end": 9.0 - number}},
                checks=[{"name": "resume_drift", "passed": number == 0}],
                environment={"python": "3.12.1", "host": f"node-{number}", "packages": {"torch": "2.11.0"}},
                dagster_run_id=RUN if number else None,
                objects=Objects(
                    sources=objects.put(pack(code), "sources"),
                    packages=objects.put_json(packages, "packages"),
                ),
            )
        )
    return store, *sides


def test_every_part_names_what_differs_with_both_values(pair):
    store, old, new = pair
    found = compare(store, old, new)
    assert [str(each) for each in found.identity.recipe] == ["training.optimizer.lr 0.002 → 0.004"]
    assert (found.identity.sources, found.inputs, found.execution) == ((), (), ())
    assert [(each.path, each.added, each.removed) for each in found.code] == [
        ("trainer/a.py", 1, 1),
        ("trainer/new_0.py", 0, 1),
        ("trainer/new_1.py", 1, 0),
    ]
    assert [str(each) for each in found.installed] == ["numpy 2.0 → 2.1"]
    assert [each.name for each in found.environment] == ["host"]
    assert found.metrics == (
        NumberChange("loss", 3.0, 4.0, False),
        NumberChange("train_seconds", 28.0, 29.0, True),
        NumberChange("details.heldout.end", 9.0, 8.0, False),
    )
    assert (found.parting.step, [each.name for each in found.parting.numbers]) == (2, ["loss"])
    assert [str(each) for each in found.checks] == ["resume_drift passed → failed"]
    assert [each.path for each in found.files] == ["model.safetensors"]
    assert (found.same, found.same_content, found.same_recipe, found.kind) == (
        False,
        False,
        False,
        "checkpoint",
    )
    assert json.loads(json.dumps(found.to_dict()))["recipe"] == [
        {"name": "training.optimizer.lr", "old": "0.002", "new": "0.004"}
    ]


def test_an_artifact_is_the_same_as_itself(pair):
    store, old, _ = pair
    found = compare(store, old, old)
    assert found.same
    listed = [found.inputs, found.code, found.environment, found.metrics, found.checks, found.files]
    assert not any(listed)
    assert found.parting is None


def test_the_code_is_a_difference_that_git_applies(pair, tmp_path):
    store, old, new = pair
    objects = ObjectStore(store.root)
    lines = list(unified(objects, old.objects.sources, new.objects.sources))
    (tmp_path / "trainer").mkdir()
    for name, text in (("a", "def step():\n    return 0\n"), ("b", "same\n"), ("new_0", "x = 1")):
        (tmp_path / "trainer" / f"{name}.py").write_text(text)
    text = "".join(f"{line}\n" for line in lines).encode()
    subprocess.run(["git", "apply", "-"], cwd=tmp_path, input=text, check=True)
    there = {path.name: path.read_text() for path in (tmp_path / "trainer").iterdir()}
    assert there == {"a.py": "def step():\n    return 1\n", "b.py": "same\n", "new_1.py": "x = 1"}
    assert list(unified(objects, old.objects.sources, new.objects.sources, ["trainer/b.py"])) == []


def test_a_snapshot_that_is_gone_is_a_note_and_no_end(tmp_path):
    store = Store(tmp_path / "artifacts")
    sides = [publish(store, "synth", objects=Objects(sources=digit * 64)) for digit in "12"]
    found = compare(store, *sides)
    assert found.code == ()
    assert found.notes[0].startswith("code: object 1111")


def test_things_of_two_kinds_are_refused_with_the_remedy(pair):
    store, old, _ = pair
    report = publish(store, "report", files={"report.md": b"x"})
    with pytest.raises(ComparisonError, match=r"of kind checkpoint and .* of kind files: name two of one"):
        compare(store, old, report)


def test_what_a_word_stands_for(pair):
    store, old, new = pair
    assert designated(store, "vpmoe_stage1", "smoke") == new
    assert designated(store, f"smoke/vpmoe_stage1@{old.version}", "full") == old
    assert designated(store, old.record_digest[:10], "smoke") == old
    run = designated(store, RUN, "smoke")
    assert isinstance(run, Group)
    assert run.records == {"vpmoe_stage1": new}
    assert "synth" in designated(store, "smoke", "full").records
    assert before(store, new) == old
    with pytest.raises(ArtifactMissing, match="is the first version"):
        before(store, old)
    for word, said in (
        ("nonesuch", "no asset of experiment smoke"),
        ("smoke/nonesuch", "there is: "),
        ("f" * 12, "no experiment, run or record"),
        ("00000000-0000-0000-0000-000000000000", "of the run"),
    ):
        with pytest.raises(ArtifactMissing, match=said):
            designated(store, word, "smoke")


def test_experiments_tell_causes_from_what_follows(tmp_path):
    store = Store(tmp_path / "artifacts")
    for name, rows in (("smoke", 10), ("wide", 20)):
        tokenizer = publish(store, "tokenizer", experiment=name, recipe_keys={}, files={"t": b"t"})
        keys, files = {"rows": rows}, {"d": bytes(rows)}
        data = publish(store, "data", (tokenizer,), experiment=name, recipe_keys=keys, files=files)
        publish(store, "model", (data,), experiment=name, recipe_keys={}, files={"m": bytes(rows)})
    publish(store, "extra", experiment="wide")
    found = compare_groups(store, designated(store, "smoke", "x"), designated(store, "wide", "x"))
    assert [(pair.asset, pair.state, bool(pair.own), pair.inputs) for pair in found.pairs] == [
        ("data", "differs", True, ()),
        ("model", "differs", False, ("data",)),
        ("extra", "only in b", False, ()),
        ("tokenizer", "same", False, ()),
    ]
    assert not found.same
    smoke = designated(store, "smoke", "x")
    assert compare_groups(store, smoke, smoke).same


@given(
    st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=6),
    st.integers(0, 5),
    st.floats(0.5, 2),
)
def test_curves_part_at_the_first_step_that_differs_and_clocks_part_none(losses, at, factor):
    one = {step: {"loss": loss, "step_ms": 1.0} for step, loss in enumerate(losses)}
    other = {step: {"loss": loss, "step_ms": 2.0} for step, loss in enumerate(losses)}
    assert parting(one, other) is None
    if at < len(losses):
        other[at]["loss"] += factor * (1 + abs(losses[at]))
        assert parting(one, other).step == at
    else:
        other[len(losses)] = {"loss": 1.0}
        assert parting(one, other).step == len(losses)
