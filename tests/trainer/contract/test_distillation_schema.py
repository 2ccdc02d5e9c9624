"""The tables of distillation: what they resolve to, what they refuse, and that earlier runs stay as they were."""
# ruff: noqa: E501 -- one wrong value and its message a line

import copy
import hashlib
import json
import tomllib

import pytest

from trainer.contract.mix import Mix, mix_of
from trainer.contract.rounds import rollout_rows, round_size
from trainer.contract.schema.base import ConfigError, parse, plain
from trainer.contract.schema.experiment import CONFIGS_DIR, Experiment, load_experiment
from trainer.contract.schema.inheritance import inherit
from trainer.contract.schema.rungs.ladder import WITHOUT_GEOMETRY
from trainer.contract.schema.training import TrainRecipe

SMOKE = tomllib.loads((CONFIGS_DIR / "smoke.toml").read_text())
TABLES = tomllib.loads("""
[sources.teacher]
kind = "artifact"
asset = "vpmoe_stage1"
extra_steps = 20
reasoning_mode = "high"
[stages.teacher_topk]
topk = 32
subset_fraction = 0.2
tail_draws = 8
[stages.vpmoe_stage2]
steps = 6
scored_fraction = 0.7
kd = { kl_weight = 0.25, rescored = { tau = 1.0, w_min = 0.25, w_max = 4.0 } }
[stages.vpmoe_stage3]
steps = 4
anchor_fraction = 0.15
max_new_tokens = 64
temperature = 1.0
buffer_size = 16
max_staleness = 1
delay = 1
advantage_clip = 5.0
curriculum = [ { until = 0.33, medium = 1.0, high = 0.0, rollouts = 1 }, { until = 1.0, medium = 0.3, high = 0.7, rollouts = 2 } ]
""")
SERVER = {
    "kind": "server",
    "model": "openai/gpt-oss-120b",
    "revision": "0" * 40,
    "url_env": "TEACHER_URLS",
    "reasoning_mode": "high",
}


def experiment(changes=(), drop=()):
    """Smoke with the tables above, some keys (dotted paths) set, and some dropped."""
    raw = copy.deepcopy(SMOKE)
    raw["sources"] |= copy.deepcopy(TABLES["sources"])
    raw["stages"] |= copy.deepcopy(TABLES["stages"])
    for path, value in dict(changes).items():
        *tables, key = path.split(".")
        table = raw
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    for path in drop:
        *tables, key = path.split(".")
        table = raw
        for name in tables:
            table = table[name]
        del table[key]
    return parse(Experiment, inherit(raw, WITHOUT_GEOMETRY, {"teacher_topk"})[0])


BEFORE = {
    ("smoke", "vpdense0_5_28_healed"): "e900e4962ba08966",
    ("smoke", "vpdense_28_healed"): "56a5cdadd0c88355",
    ("smoke", "vpdense_80_healed"): "4f43ff6f09c236a3",
    ("smoke", "vpmoe_stage1"): "31cbeaca42530dad",
    ("full", "vpdense0_5_28_healed"): "e88fd22e38e751b5",
    ("full", "vpdense_28_healed"): "532d2b06797076b4",
    ("full", "vpdense_80_healed"): "9abdbf587ed119d2",
    ("full", "vpmoe_stage1"): "4f36d6c407acfe0d",
    ("bench", "vpmoe_stage1"): "6875046f7507f942",
}
"""sha256 of the recipes as they were before there was a table of distillation (commit de0e72a), those of `full` and
`bench` with `backend = "fused"`: whoever changes a config's runs on purpose writes the new ones here."""


@pytest.mark.parametrize(("name", "run"), BEFORE)
def test_recipes_of_runs_from_before_distillation_are_as_they_were(name, run):
    text = json.dumps(plain(load_experiment(name).train_recipe(run)))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == BEFORE[name, run]


def test_the_stages_have_their_place_in_the_ladder_and_the_store_and_the_teacher_have_none():
    found = experiment()
    assert found.ladder()[-4:] == ("vpmoe", "vpmoe_stage1", "vpmoe_stage2", "vpmoe_stage3")
    assert found.runs()[-4:] == ("vpmoe_stage1", "teacher", "vpmoe_stage2", "vpmoe_stage3")
    assert found.stages.names() == ("vpmoe_stage1", "teacher_topk", "vpmoe_stage2", "vpmoe_stage3")
    assert found.evaluate_recipe("vpmoe_stage3").checkpoints["vpmoe_stage3"].architecture.moe is not None
    assert experiment({"sources.teacher": SERVER, "stages.teacher_topk.tail_draws": 0}).runs()[-3:] == (
        "vpmoe_stage1",
        "vpmoe_stage2",
        "vpmoe_stage3",
    )


def test_a_teacher_of_ours_trains_on_by_the_recipe_of_the_run_that_it_starts_from():
    recipe, parent = experiment().train_recipe("teacher"), experiment().train_recipe("vpmoe_stage1")
    assert recipe == parent.model_copy(update={"steps": 20})
    assert recipe.init == "checkpoint"
    with pytest.raises(ConfigError, match="teacher: not a training run of this experiment"):
        experiment({"sources.teacher": SERVER, "stages.teacher_topk.tail_draws": 0}).train_recipe("teacher")


def test_the_recipe_of_stage_2_has_what_is_asked_for_and_no_more():
    recipe = experiment().train_recipe("vpmoe_stage2")
    assert recipe.objective == "topk_kl"
    assert plain(recipe)["scored"] == {
        "fraction": 0.7,
        "subset_fraction": 0.2,
        "topk": 32,
        "tail_draws": 8,
    }
    asked = {"span_weight_reasoning": 1.0, "span_weight_final": 1.0, "kl_weight": 0.25}
    asked["rescored"] = {"tau": 1.0, "w_min": 0.25, "w_max": 4.0}
    assert plain(recipe)["kd"] == asked | {"target": "bucket"}
    assert "rollouts" not in plain(recipe)
    assert mix_of(recipe) == Mix("scored", 0.7, "conversations")
    alone = experiment({"stages.vpmoe_stage2.kd": {}}).train_recipe("vpmoe_stage2").kd
    assert (alone.kl_weight, alone.target, alone.rescored) == (0.5, "bucket", None)
    other = experiment({"stages.vpmoe_stage2.objective": "rescored_ce"}).train_recipe("vpmoe_stage2").kd
    assert (other.kl_weight, other.target) == (0.25, None), "nothing is added that it would not use"


def test_the_recipe_of_stage_3_has_every_key_of_its_rollouts():
    recipe = experiment().train_recipe("vpmoe_stage3")
    assert recipe.objective == "opd"
    assert plain(recipe)["kd"].keys() == {"span_weight_reasoning", "span_weight_final"}
    found = plain(recipe)["rollouts"]
    asked = {key: value for key, value in TABLES["stages"]["vpmoe_stage3"].items() if key != "steps"}
    phases = [{"low": 0.0, **phase} for phase in asked["curriculum"]]
    defaults = {"baseline": False, "baseline_topk": 32, "exclude_special_tokens": False}
    assert found == asked | {"curriculum": phases} | defaults
    assert (round_size(16, delay=1), rollout_rows(2, 0.15)) == (8, 2)
    assert mix_of(recipe).kinds == ("conversations", "rollouts")
    assert mix_of(recipe).shares == {"conversations": 0.15, "rollouts": 0.85}


@pytest.mark.parametrize("run", ["teacher", "vpmoe_stage2", "vpmoe_stage3"])
def test_recipes_and_experiments_read_back_as_themselves(run):
    found = experiment()
    recipe = found.train_recipe(run)
    assert parse(TrainRecipe, json.loads(json.dumps(plain(recipe)))) == recipe
    assert parse(Experiment, json.loads(json.dumps(plain(found)))) == found


def test_a_stage_that_is_no_training_run_inherits_no_training():
    assert not hasattr(experiment().stages.teacher_topk, "training")
    assert experiment().stages.vpmoe_stage3.training == experiment().training


STAGE2, STAGE3 = "stages.vpmoe_stage2", "stages.vpmoe_stage3"
CURRICULUM = f"{STAGE3}.curriculum"
REFUSED = [
    ({}, ["sources.teacher"], r"stages\.teacher_topk needs sources\.teacher"),
    ({}, ["stages.teacher_topk"], r"stages\.vpmoe_stage2 needs stages\.teacher_topk"),
    ({}, [STAGE2], r"stages\.vpmoe_stage3 needs stages\.vpmoe_stage2"),
    ({"sources.teacher.asset": "vpmoe_stage2"}, [], r"sources\.teacher\.asset = 'vpmoe_stage2'.*allowed: vpmoe_stage1"),
    ({"sources.teacher.reasoning_mode": "High"}, [], r"reasoning_mode: found 'High'; allowed: 'low', 'medium' or 'high'"),
    ({"sources.teacher": SERVER}, [], r"tail_draws = 8.*'server'.*tail_draws = 0"),
    ({"sources.teacher": SERVER | {"url_env": "http://x"}}, [], r"sources\.teacher\.url_env|url_env: found"),
    ({"stages.teacher_topk.topk": 201089}, [], r"topk = 201089 is more than the vocabulary of 201088"),
    ({"stages.teacher_topk.topk": 0}, [], r"topk: found 0"),
    ({"stages.teacher_topk.mass": 1.0}, [], r"mass: found 1\.0"),
    ({"stages.teacher_topk.subset_fraction": 0.0}, [], r"subset_fraction: found 0\.0"),
    ({"stages.teacher_topk.training": {}}, [], r"stages\.teacher_topk\.training: unknown key"),
    ({f"{STAGE2}.scored_fraction": 0.0}, [], r"scored_fraction: found 0\.0"),
    ({f"{STAGE2}.scored_fraction": 1.1}, [], r"scored_fraction: found 1\.1"),
    ({f"{STAGE2}.kd.kl_weight": 1.5}, [], r"kl_weight: found 1\.5"),
    ({f"{STAGE2}.kd.target": "renormalised"}, [], r"target: found 'renormalised'; allowed: 'bucket', 'unbiased' or 'mix'"),
    ({f"{STAGE2}.kd.target": "mix", "stages.teacher_topk.tail_draws": 0}, [], r"target = 'mix' needs stages\.teacher_topk\.tail_draws > 0"),
    ({f"{STAGE2}.kd.rescored": {"w_min": 5.0}}, [], r"w_min = 5\.0 is more than w_max = 4\.0"),
    ({f"{STAGE3}.anchor_fraction": 1.0}, [], r"anchor_fraction: found 1\.0"),
    ({f"{STAGE3}.delay": 2}, [], r"max_staleness = 1 is less than delay = 2"),
    ({f"{STAGE3}.buffer_size": 1}, [], r"buffer_size = 1 holds less than one rollout.*raise it to 2"),
    ({f"{STAGE3}.buffer_size": 3}, [], r"gives 1 rollouts for a step, which has 2 samples.*raise buffer_size to 4"),
    ({f"{STAGE3}.temperature": 0.0}, [], r"temperature: found 0\.0"),
    ({CURRICULUM: []}, [], r"curriculum: found \[\]"),
    ({CURRICULUM: [{"until": 0.5, "medium": 1.0, "high": 0.0, "rollouts": 1}]}, [], r"the last one must end at 1"),
    ({CURRICULUM: [{"until": 1.0, "medium": 0.5, "high": 0.4, "rollouts": 1}]}, [], r"curriculum\[0\]: low, medium and high add up to 0\.9"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "drop", "message"), REFUSED, ids=lambda value: str(value)[:50])
def test_what_does_not_fit_together_is_refused_with_its_remedy(changes, drop, message):
    with pytest.raises(ConfigError, match=message):
        experiment(changes, drop)


@pytest.mark.parametrize(
    ("run", "changes", "message"),
    [
        (
            "vpmoe_stage2",
            {"harmony_fraction": 0.5},
            "scored with harmony_fraction = 0.5: a run mixes two kinds of",
        ),
        ("vpmoe_stage2", {"scored": None}, "kd.kl_weight, kd.target, kd.rescored: for scored conversations"),
        (
            "vpmoe_stage2",
            {
                "kd": {"target": "unbiased"},
                "scored": {"fraction": 0.7, "subset_fraction": 0.2, "topk": 4, "tail_draws": 0},
            },
            "kd.target = 'unbiased' needs scored.tail_draws > 0",
        ),
        ("vpmoe_stage3", {"seq_len": 64}, "max_new_tokens = 64 leaves no room for a prompt in seq_len = 64"),
    ],
)
def test_a_recipe_that_does_not_fit_together_is_refused(run, changes, message):
    recipe = plain(experiment().train_recipe(run))
    with pytest.raises(ConfigError, match=message):
        parse(TrainRecipe, {key: value for key, value in (recipe | changes).items() if value is not None})


def test_a_mix_names_the_kinds_that_it_has_samples_of():
    assert Mix("a", 0.0, "b").kinds == ("b",)
    assert Mix("a", 1.0, "b").shares == {"a": 1.0}


def test_the_recipe_of_the_store_says_both_modes_and_what_the_teacher_computes_in():
    recipe = experiment({"sources.teacher.reasoning_mode": "medium"}).score_recipe()
    assert plain(recipe) == {
        "topk": 32,
        "subset_fraction": 0.2,
        "tail_draws": 8,
        "logprob_error": 0.01,
        "reasoning_mode": "medium",
        "stored_mode": "high",
        "dtype": "fp32",
        "backend": "reference",
    }
    with pytest.raises(ConfigError, match=r"stages\.teacher_topk: missing"):
        experiment(drop=("stages.teacher_topk", "stages.vpmoe_stage2", "stages.vpmoe_stage3")).score_recipe()
