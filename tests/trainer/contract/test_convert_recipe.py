"""Recipes of conversions: resolved from an experiment, refused where step and geometry do not fit."""

import copy
import itertools
import json

import pytest

from trainer.contract.schema.base import ConfigError, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.job import load_job
from trainer.contract.schema.rungs.expand import ExpandRecipe
from trainer.contract.schema.rungs.ladder import RECIPES, parse_convert_recipe
from trainer.contract.schema.rungs.vpdense import DenseRecipe

LADDER = ("qwen3_0_6b_o200k", "vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe")


@pytest.mark.parametrize("name", ["smoke", "full"])
def test_every_rung_has_a_recipe_that_starts_where_the_one_before_ended(name):
    experiment = load_experiment(name)
    recipes = {rung: experiment.convert_recipe(rung) for rung in LADDER}
    assert [recipe.step for recipe in recipes.values()] == [
        "vocabulary",
        "vpdense",
        "morph",
        "expand",
        "upcycle",
    ]
    assert [recipe.source for recipe in recipes.values()] == [
        "qwen3_0_6b",
        "qwen3_0_6b_o200k",
        "vpdense0_5_28_healed",
        "vpdense_28_healed",
        "vpdense_80_healed",
    ]
    for before, after in itertools.pairwise(LADDER[1:]):
        assert recipes[after].parent == recipes[before].architecture == experiment.architecture(before)
        assert recipes[after].parent_dtype == recipes[before].dtype
        assert (
            recipes[after].dtype
            == (experiment.stages.vpmoe_stage1 if after == "vpmoe" else experiment).training.dtype
        )


@pytest.mark.parametrize("rung", LADDER)
def test_a_recipe_survives_json(rung):
    recipe = load_experiment("full").convert_recipe(rung)
    assert parse_convert_recipe(json.loads(json.dumps(plain(recipe)))) == recipe


def test_an_unhealed_rung_is_the_source_itself():
    experiment = load_experiment("smoke")
    bare = experiment.rungs.vpdense_28.model_copy(update={"healing": None})
    experiment = experiment.model_copy(
        update={"rungs": experiment.rungs.model_copy(update={"vpdense_28": bare})}
    )
    assert experiment.convert_recipe("vpdense_80").source == "vpdense_28"


def without(rung):
    experiment = load_experiment("smoke")
    rungs = experiment.rungs.model_copy(update={rung: None})
    return experiment.model_copy(update={"rungs": rungs})


def test_a_rung_that_cannot_start_from_the_one_before_says_what_it_needs():
    with pytest.raises(
        ConfigError,
        match=r"rungs\.vpdense_28: is made from a dense student, but the rung before it is qwen3_0_6b_o200k",
    ):
        without("vpdense0_5_28").convert_recipe("vpdense_28")
    with pytest.raises(ConfigError, match=r"rungs\.vpdense0_5_28: .* no rung before it that has the donor's"):
        without("qwen3_0_6b_o200k").convert_recipe("vpdense0_5_28")


def test_a_rung_may_be_left_out_where_the_one_before_it_will_do():
    recipe = without("vpdense_80").convert_recipe("vpdense_28")
    assert recipe == load_experiment("smoke").convert_recipe("vpdense_28")
    with pytest.raises(ConfigError, match="num_layers: 8 in the parent, 16 here"):
        without("vpdense_80").convert_recipe("vpmoe")


@pytest.mark.parametrize(
    ("rung", "inputs"),
    [
        ("qwen3_0_6b_o200k", ("qwen3_0_6b", "gpt_oss_20b")),
        ("vpdense0_5_28", ("qwen3_0_6b_o200k", "healing_text_v1")),
        ("vpdense_28", ("vpdense0_5_28_healed", "healing_text_v1")),
        ("vpdense_80", ("vpdense_28_healed",)),
        ("vpmoe", ("vpdense_80_healed",)),
    ],
)
def test_what_a_rung_is_made_from_is_what_its_recipe_names(rung, inputs):
    assert load_experiment("smoke").convert_inputs(rung) == inputs


def test_an_experiment_without_a_ladder_says_so():
    with pytest.raises(ConfigError, match=r"rungs\.vpmoe\.surgery: missing"):
        load_experiment("bench").convert_recipe("vpmoe")


def changed(rung: str, **changes):
    raw = copy.deepcopy(plain(load_experiment("full").convert_recipe(rung)))
    for key, value in changes.items():
        *path, last = key.split("__")
        table = raw
        for part in path:
            table = table[part]
        table[last] = value
    return raw


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        ({}, f"step: missing; allowed: {', '.join(map(repr, RECIPES))}"),
        ({"step": "fly"}, "step: found 'fly'"),
        ({"step": {"fly": 1}}, "step: found {'fly': 1}"),
        (changed("vpdense_80", surgeri={}), "surgeri: unknown key; the nearest valid key is 'surgery'"),
        (changed("vpdense0_5_28", donor__head_dim=64), "model.head_dim = 128, but the donor has 64"),
        (
            changed("vpdense0_5_28", donor__rope_theta=1e4),
            "grape.rotary_base = 1000000.0, but the donor has 10000",
        ),
        (
            changed("vpdense0_5_28", donor__num_attention_heads=12, donor__num_key_value_heads=4),
            "does not divide the donor's 12 heads",
        ),
        (
            changed("vpdense0_5_28", donor__num_attention_heads=12),
            "num_attention_heads = 12 is not a multiple of num_key_value_heads = 8",
        ),
        (changed("vpdense0_5_28", donor__intermediate_size=256), "wider than the donor's FFN of 256"),
        (
            changed("vpdense0_5_28", architecture__model__softmax_type="learnable"),
            "model.softmax_type = 'learnable', but the donor has 'vanilla'",
        ),
        (changed("vpdense_28", parent__model__num_layers=8), "num_layers: 8 in the parent, 28 here"),
        (
            changed("vpdense_80", parent__model__ffn_hidden_size=256),
            "ffn_hidden_size: 256 in the parent, 512",
        ),
        (changed("vpdense_80", architecture__model__num_layers=24), "less than the parent's 28"),
        (changed("vpdense_80", architecture__model__num_layers=32, parent__model__num_layers=16), None),
        (changed("vpmoe", architecture__model__dense_ffn_hidden_size=128), "surgery.layer1 = 'shrink'"),
        (
            changed("vpmoe", architecture__model__ffn_hidden_size=96),
            "does not divide the parent's 512 neurons",
        ),
        (changed("vpmoe", architecture__moe__shared_expert_size=256), "they must be equal"),
        (changed("vpmoe", architecture__model__num_layers=84), "num_layers: 80 in the parent, 84 here"),
        (changed("qwen3_0_6b_o200k", surgery__k=4096), "more than the 2880 dimensions"),
    ],
)
def test_what_a_step_cannot_do_is_refused_naming_key_and_values(raw, message):
    if message is None:
        assert isinstance(parse_convert_recipe(raw), ExpandRecipe)
        return
    with pytest.raises(ConfigError) as refused:
        parse_convert_recipe(raw)
    assert message in str(refused.value)


def test_a_pattern_that_does_not_repeat_every_block_is_refused():
    raw = changed(
        "vpdense_80",
        parent__attention__window_attn_skip_freq=7,
        architecture__attention__window_attn_skip_freq=8,
    )
    with pytest.raises(ConfigError, match="window_attn_skip_freq"):
        parse_convert_recipe(raw)
    pattern = [1, 1, 1, 0] * 6 + [0, 1, 1, 1]
    raw = changed(
        "vpdense_80",
        parent__attention__window_attn_skip_freq=pattern,
        architecture__attention__window_attn_skip_freq=pattern,
        architecture__model__num_layers=28,
    )
    assert isinstance(parse_convert_recipe(raw), ExpandRecipe)


def job(tmp_path, **changes):
    recipe = plain(load_experiment("smoke").convert_recipe("vpdense0_5_28"))
    raw = {
        "schema": "vpmoe.job/1",
        "command": "convert",
        "asset": "vpdense0_5_28",
        "experiment": "smoke",
        "recipe": recipe,
        "recipe_fingerprint": "f",
        "seed": 1,
        "inputs": {
            "qwen3_0_6b_o200k": {"path": "/a", "digest": "d"},
            "healing_text_v1": {"path": "/b", "digest": "d"},
        },
        "execution": {"device": "cpu"},
        "provenance": {"git_sha": "a", "git_dirty": False, "source_digest": "b", "lock_digest": "c"},
        "work_dir": "/w",
        "output_dir": "/o",
    } | changes
    path = tmp_path / "job.json"
    path.write_text(json.dumps(raw))
    return path


def test_load_job_checks_recipe_inputs_and_processes(tmp_path):
    assert isinstance(load_job(job(tmp_path)).convert_recipe(), DenseRecipe)
    with pytest.raises(ConfigError, match=r"inputs\.healing_text_v1: missing; recipe\.text names it"):
        load_job(job(tmp_path, inputs={"qwen3_0_6b_o200k": {"path": "/a", "digest": "d"}}))
    with pytest.raises(ConfigError, match=r"execution\.nproc = 2; a conversion streams through one process"):
        load_job(job(tmp_path, execution={"device": "cpu", "nproc": 2, "dp": 2}))
    with pytest.raises(ConfigError, match="step: missing"):
        load_job(job(tmp_path, recipe={}))
    with pytest.raises(ConfigError, match="only a 'convert' job"):
        load_job(
            job(
                tmp_path,
                command="train",
                recipe=plain(load_experiment("smoke").train_recipe("vpmoe_stage1")),
            )
        ).convert_recipe()
