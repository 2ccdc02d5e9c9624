"""`vpmoe diff` as its users meet it: one screen, details on demand, exit codes of `diff`."""

import json

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import save

from tests.lineage.fabricate import publish
from vpmoe_assets.cli import main
from vpmoe_assets.commands.diff_lines import COLUMNS, SCREEN
from vpmoe_assets.lineage.store import Store


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    store = Store(tmp_path_factory.mktemp("diff") / "artifacts")
    data = publish(store, "synth", files={"a.jsonl": b'{"id": 1}\n'}, recipe_keys={})
    for number, lr in enumerate((0.002, 0.004)):
        publish(
            store,
            "vpmoe_stage1",
            (data,),
            recipe_keys={"lr": lr},
            files={"model.safetensors": save({"w": np.full(3, number, np.float32)})},
            metrics={"loss": 3.0 + number},
        )
    publish(store, "synth", files={"a.jsonl": b'{"id": 1}\n{"id": 2}\n'}, recipe_keys={"rows": 2})
    publish(store, "synth", experiment="wide", files={"a.jsonl": b'{"id": 1}\n'}, recipe_keys={})
    return store


@pytest.fixture
def run(store, monkeypatch):
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(store.root))
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)

    def ask(*arguments, code=1):
        done = CliRunner().invoke(main, ["diff", *arguments])
        assert done.exit_code == code, done.output + repr(done.exception)
        return done

    return ask


def test_two_trainings_that_differ_in_one_value_are_answered_on_one_screen(run):
    lines = run("vpmoe_stage1").output.splitlines()
    assert len(lines) <= SCREEN
    assert max(map(len, lines)) <= COLUMNS
    told = dict(line.split(maxsplit=1) for line in lines[3:])
    assert lines[2] == "other content; what differs in how they were made: recipe"
    assert told["recipe"] == "lr 0.002 → 0.004"
    assert told["code"].startswith("the same")
    assert told["metrics"] == "loss 3 → 4 (+33.33%)"
    assert told["files"].startswith("1 of 1 differ: model.safetensors")


def test_exit_codes_are_those_of_diff(run, store):
    first = store.versions("smoke", "vpmoe_stage1")[0]
    assert "the same" in run("vpmoe_stage1", "vpmoe_stage1", code=0).output
    run("vpmoe_stage1", f"vpmoe_stage1@{first}")
    for wrong in (
        ["nonesuch"],
        ["synth", "vpmoe_stage1"],
        ["synth", "wide"],
        ["smoke"],
        ["full/synth", "synth"],
    ):
        said = run(*wrong, code=2).stderr
        assert "Error: " in said
        assert "Traceback" not in said
    assert "two checkpoints; smoke/synth" in run("synth", "--tensors", code=2).stderr
    assert "two forms" in run("synth", "--json", "--markdown", code=2).stderr


def test_details_on_demand(run):
    assert "w  ‖b−a‖ 1.732" in run("vpmoe_stage1", "--tensors").output
    assert "1 added, 0 removed, 0 changed (1 → 2)" in run("synth", "--rows").output
    answer = json.loads(run("synth", "--rows", "--json").output)
    assert (answer["schema"], answer["rows"]["added_examples"]) == ("vpmoe.diff/1", ["2"])
    text = run("vpmoe_stage1", "--markdown").output
    assert "| recipe | lr 0.002 → 0.004 |" in text
    assert "### files" in text


def test_experiments_are_compared_asset_by_asset(run):
    lines = run("smoke", "wide").output.splitlines()
    assert lines[2] == "2 assets: 1 differs, 1 only in a"
    assert any(line.startswith("  synth  differs  recipe rows 2 → (absent)") for line in lines)
    assert json.loads(run("smoke", "wide", "--json").output)["what"] == "experiment"
    assert "one asset of each" in run("smoke", "wide", "--files", code=2).stderr
