"""The rungs as assets: what each is made of, what is recorded of it, what a failed check stops."""

import json
import pkgutil
import sys
import types
from pathlib import Path

import pytest

from tests.assets.graphs import Graph, stand_in_trainer
from tests.assets.programs.zero_weights import write_zero_rung
from tests.lineage.fabricate import publish
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.rungs.ladder import RECIPES
from vpmoe_assets import rungs
from vpmoe_assets.assets.plots import layer_profile
from vpmoe_assets.assets.rungs import rung_assets
from vpmoe_assets.rung import load_rung

LADDER = {
    "qwen3_0_6b_o200k": {"qwen3_0_6b", "gpt_oss_20b"},
    "vpdense0_5_28": {"qwen3_0_6b_o200k", "healing_text_v1"},
    "vpdense0_5_28_healed": {"vpdense0_5_28", "healing_text_v1", "synth_kd_v1"},
    "vpdense_28": {"vpdense0_5_28_healed", "healing_text_v1"},
    "vpdense_28_healed": {"vpdense_28", "healing_text_v1", "synth_kd_v1"},
    "vpdense_80": {"vpdense_28_healed"},
    "vpdense_80_healed": {"vpdense_80", "healing_text_v1", "synth_kd_v1"},
    "vpmoe": {"vpdense_80_healed"},
    "vpmoe_stage1": {"vpmoe", "synth_kd_v1"},
}


@pytest.fixture
def ladder(tiny, monkeypatch, tmp_path) -> Graph:
    """The experiment from a rung that is there already: the depth step is the first to be made."""
    trainer = stand_in_trainer(monkeypatch, "stand_in_conversion", nproc=2, dp=2)
    tiny.resources = {"trainer": trainer}
    recipe = load_experiment(str(tiny.experiment)).convert_recipe("vpdense_80")
    write_zero_rung(tmp_path / "parent", recipe.parent, recipe.parent_dtype)
    files = {path.name: path.read_bytes() for path in (tmp_path / "parent").iterdir()}
    publish(tiny.store, "vpdense_28_healed", experiment="tiny", files=files)
    return tiny


def ask(monkeypatch: pytest.MonkeyPatch, **what: object) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps(what))


def test_every_rung_is_made_of_the_one_before(tmp_path):
    specs = {
        spec.key.path[-1]: spec for spec in Graph("smoke", tmp_path).definitions().resolve_all_asset_specs()
    }
    for asset, inputs in LADDER.items():
        assert {dep.asset_key.path[-1] for dep in specs[asset].deps} == inputs, asset
    assert {name for name, spec in specs.items() if spec.group_name == "rungs"} == LADDER.keys() - {
        "vpmoe_stage1"
    }


def test_an_experiment_makes_the_rungs_that_it_has_a_surgery_for():
    assert rung_assets(load_experiment("bench")) == []
    full = [step.asset for made in rung_assets(load_experiment("full")) for step in made.steps]
    assert full == [name for name in LADDER if name != "vpmoe_stage1"]


def test_each_step_has_one_module_that_describes_its_rung_and_the_package_has_no_other():
    assert {module.name for module in pkgutil.iter_modules(rungs.__path__)} == RECIPES.keys()
    for step in RECIPES:
        _, description = load_rung(step)
        first, empty, *rest = description.splitlines()
        assert first.endswith(".")
        assert empty == ""
        assert rest, f"{step}: say how it is done"


def test_what_describes_no_rung_is_refused(monkeypatch):
    with pytest.raises(LookupError, match=r"no module vpmoe_assets\.rungs\.fly"):
        load_rung("fly")
    monkeypatch.setitem(sys.modules, "vpmoe_assets.rungs.helper", types.ModuleType("helper", "Helps."))
    with pytest.raises(LookupError, match="describes no rung: it needs a docstring and RUNG"):
        load_rung("helper")


def test_a_conversion_is_published_with_its_table_plot_and_provenance(ladder):
    run = ladder.make("vpdense_80")
    record = ladder.latest("vpdense_80")
    assert [item.asset for item in record.inputs] == ["vpdense_28_healed"]
    assert record.metrics == {
        "parameters": 4321,
        "num_layers": 16,
        "hidden_size": 64,
        "vocab_size": 201088,
        "convert_seconds": 2.5,
        "peak_rss_bytes": 10**9,
    }
    assert record.details["transform"] == {"zeroed": ["linear_proj"]}
    assert record.details["student_spec"]["num_layers"] == 16
    assert record.details["parent_provenance_sha256"] == "0" * 64
    assert record.details["calibration"] == {"tokens": 5}
    shown = run.metadata("vpdense_80")
    assert [row.data["residual_change"] for row in shown["layers"].records] == [0.1, 0.2, 0.3]
    assert shown["profile"].startswith("![measured layer by layer](data:image/png;base64,")
    assert Path(shown["log"]).read_text() == "convert expand\n"
    assert (shown["parameters"], shown["num_layers"], shown["hidden_size"]) == (4321, 16, 64)
    assert run.checks("vpdense_80")["logits_bit_identical"].metadata["measured"].value == 0.25


def test_a_conversion_runs_in_one_process_whatever_training_runs_in(ladder):
    ladder.make("vpdense_80")
    record = ladder.latest("vpdense_80")
    job = json.loads((ladder.store.directory(record) / "run" / "job.json").read_bytes())
    assert (job["command"], job["recipe"]["step"]) == ("convert", "expand")
    assert [job["execution"][name] for name in ("nproc", "dp", "tp", "ep")] == [1, 1, 1, 1]


def test_a_conversion_that_was_made_is_reused_until_its_recipe_changes(ladder, graph):
    first = ladder.make("vpdense_80")
    again = ladder.make("vpdense_80")
    assert not first.metadata("vpdense_80")["reused"]
    assert again.metadata("vpdense_80")["reused"]
    other = graph({"window_size = 32": "window_size = 64"}, root=ladder.root)
    other.resources = ladder.resources
    assert not other.make("vpdense_80").metadata("vpdense_80")["reused"]


def test_logits_that_differ_stop_the_rungs_below(ladder, monkeypatch):
    ask(monkeypatch, failed=["logits_bit_identical"])
    run = ladder.run("vpdense_80", "vpdense_80_healed")
    assert not run.success
    assert run.started == ["vpdense_80"]
    check = run.checks("vpdense_80")["logits_bit_identical"]
    assert (check.passed, check.description) == (False, "logits_bit_identical is not so")
    later = ladder.run("vpdense_80_healed")
    assert "logits_bit_identical" in later.error()


def test_what_was_not_measured_has_not_passed(ladder, monkeypatch):
    ask(monkeypatch, unmeasured=["logits_bit_identical"])
    run = ladder.run("vpdense_80")
    check = run.checks("vpdense_80")["logits_bit_identical"]
    words = "the conversion did not measure logits_bit_identical"
    assert (check.passed, check.description) == (False, words)


def test_the_profile_draws_columns_that_vary_over_layers():
    rows = [{"layer": n, "kind": "local", "flat": 1.0, "rising": n * 0.5, "rare": None} for n in (1, 2, 3)]
    assert layer_profile(rows) is not None
    assert layer_profile([{**row, "rising": 2.0} for row in rows]) is None
    assert layer_profile([{"matrix": "embedding", "rows": 5}]) is None
    assert layer_profile([]) is None
