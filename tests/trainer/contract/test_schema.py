"""Experiments and jobs: all load, all resolve, and whatever is wrong is refused by its full key path."""
# ruff: noqa: E501 -- one wrong value and its message a line

import copy
import json
import subprocess
import sys
import tomllib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from tests.trainer.other_backend import add_backend
from trainer.contract.fusions import asked_fusions
from trainer.contract.geometry import geometry
from trainer.contract.layers import dense_ffn_hidden_size, layer_kinds, moe_layers
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError, parse, plain
from trainer.contract.schema.experiment import CONFIGS_DIR, Experiment, load_experiment, scaled_to
from trainer.contract.schema.job import Execution, Job, load_job
from trainer.contract.schema.training import OptimizerConfig, TrainRecipe

SMOKE = tomllib.loads((CONFIGS_DIR / "smoke.toml").read_text())
NAMES = ("smoke", "full", "bench")
DISTILLATION = ("teacher_topk", "vpmoe_stage2", "vpmoe_stage3")


def toml_value(value):
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{json.dumps(k)} = {toml_value(v)}" for k, v in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(toml_value, value)) + "]"
    if isinstance(value, float):
        return {"nan": "nan", "inf": "inf"}.get(str(value), repr(value))
    return json.dumps(value)


def load_changed(tmp_path, changes, drop=()):
    """Load smoke with some keys (dotted paths) set, and some dropped."""
    raw = copy.deepcopy(SMOKE)
    for path in drop:
        *tables, key = path.split(".")
        table = raw
        for name in tables:
            table = table[name]
        del table[key]
    for path, value in changes.items():
        *tables, key = path.split(".")
        table = raw
        for name in tables:
            table = table.setdefault(name, {})
        table[key] = value
    file = tmp_path / "changed.toml"
    file.write_text("\n".join(f"{json.dumps(key)} = {toml_value(value)}" for key, value in raw.items()))
    return load_experiment(file)


def problems(tmp_path, changes, drop=()):
    with pytest.raises(ConfigError) as refused:
        load_changed(tmp_path, changes, drop)
    return refused.value.problems


@pytest.mark.parametrize("name", NAMES)
def test_every_experiment_loads_and_each_of_its_runs_has_a_recipe(name):
    experiment = load_experiment(name)
    assert experiment.name == name
    for run in experiment.runs():
        recipe = experiment.train_recipe(run)
        assert parse(TrainRecipe, json.loads(json.dumps(plain(recipe)))) == recipe


@pytest.mark.parametrize("name", NAMES)
def test_the_resolved_experiment_is_json_and_reads_back_as_itself(name):
    experiment = load_experiment(name)
    text = json.dumps(plain(experiment), allow_nan=False)
    assert parse(Experiment, json.loads(text)) == experiment
    assert json.dumps(plain(load_experiment(name))) == text


def test_smoke_has_the_names_and_values_of_the_shared_model(shared_dir):
    model = tomllib.loads((shared_dir.parent / "smoke.toml").read_text())
    ours = copy.deepcopy(SMOKE)
    assert ours["stages"]["vpmoe_stage1"].pop("steps") == 8  # with its resume check in 90 s on two cores
    assert model["stages"]["vpmoe_stage1"].pop("steps") == 10
    assert ours["training"]["optimizer"].pop("decoupled_lr") == 6e-3  # for embeddings that are fresh
    assert model["training"]["optimizer"].pop("decoupled_lr") == 3e-3
    for table in ("vpdense0_5_28", "vpdense_28"):  # shorter, so that the whole graph takes minutes
        assert ours["rungs"][table]["surgery"].pop("calibration_tokens") == 4096
        assert model["rungs"][table]["surgery"].pop("calibration_tokens") == 16384
        assert ours["rungs"][table]["healing"].pop("steps") == 4
        assert model["rungs"][table]["healing"].pop("steps") == 8
    # A fit ends when it stops improving; the number of sweeps only bounds its time.
    fits = ours["rungs"]["vpdense_28"]["surgery"]
    assert (fits.pop("als_sweeps"), fits.pop("als_tolerance")) == (200, 5e-5)
    assert model["rungs"]["vpdense_28"]["surgery"].pop("als_sweeps") == 10
    # Warm-ups have a floor in steps, and a limit as a share of the run.
    schedule = ours["training"]["schedule"]
    assert (schedule.pop("min_warmup_steps"), schedule.pop("min_warmup_limit")) == (20, 0.25)
    for key in ("new_layers_only_steps", "steps"):
        assert ours["rungs"]["vpdense_80"]["healing"].pop(key) == 2
        assert model["rungs"]["vpdense_80"]["healing"].pop(key) == 4
    assert ours.pop("profile") == {"warm_up_steps": 1, "steps": 2, "seq_len": 128}  # a CPU's figures, quickly
    # Tables of distillation come with the assets that they are for.
    for table, key in (("sources", "teacher"), *(("stages", name) for name in DISTILLATION)):
        ours[table].pop(key, None)
        del model[table][key]
    del model["profiling"]  # comes with what runs it; until then it is refused
    assert ours["evaluation"].pop("ppl_tokens") == 2000
    assert model["evaluation"].pop("ppl_tokens") == 20_000
    assert ours == model


def test_loading_a_config_imports_no_torch():
    code = "import sys; from trainer.contract.schema.experiment import load_experiment; load_experiment('full'); print('torch' in sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=CONFIGS_DIR.parent, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "False"


def test_defaults_are_written_out():
    resolved = plain(load_experiment("bench"))
    assert resolved["data"]["synth_kd_v1"]["pack"] == {"block": 1024}
    assert resolved["data"]["healing_text_v1"]["valid_fraction"] == 0.10
    assert resolved["stages"]["vpmoe_stage1"]["training"]["optimizer"]["adam_beta2"] == 0.95
    assert resolved["schema"] == "vpmoe.experiment/1"


def test_rungs_inherit_their_defaults_and_override_key_by_key():
    experiment = load_experiment("smoke")
    compat, moe = experiment.architecture("vpdense0_5_28"), experiment.architecture("vpmoe")
    assert (compat.model.softmax_type, compat.model.hidden_size) == ("vanilla", 64)
    assert compat.attention.position_embedding_type == "rope"
    assert (moe.model.ffn_hidden_size, dense_ffn_hidden_size(moe), moe.model.num_layers) == (8, 32, 16)
    assert compat.moe is None
    assert moe.vocab_size == 201088


def test_stages_inherit_training_and_override_key_by_key(tmp_path):
    experiment = load_changed(tmp_path, {"stages.vpmoe_stage1.training.optimizer.lr": 5e-3})
    stage, rest = experiment.train_recipe("vpmoe_stage1"), experiment.rungs.vpdense_80.healing
    assert stage.training.optimizer.lr == 5e-3
    assert rest.training.optimizer.lr == experiment.training.optimizer.lr == 2e-3
    assert stage.training.optimizer.normuon_aux_lr == rest.training.optimizer.normuon_aux_lr


def test_a_healing_run_scales_all_rates_to_its_own_and_counts_both_phases():
    experiment = load_experiment("smoke")
    recipe = experiment.train_recipe("vpdense_80_healed")
    assert (recipe.steps, recipe.new_layers_only_steps, recipe.init) == (4, 2, "checkpoint")
    optimizer = recipe.training.optimizer
    assert optimizer.lr == 1e-3
    everywhere = experiment.training.optimizer
    for rate in ("normuon_aux_lr", "decoupled_lr"):
        assert getattr(optimizer, rate) / optimizer.lr == pytest.approx(
            getattr(everywhere, rate) / everywhere.lr
        )
    assert recipe.new_layers == (5, 6, 7, 8, 13, 14, 15, 16)
    assert recipe.harmony_fraction == 0.2
    assert recipe.kd is None


def test_only_a_rung_that_is_deeper_than_its_parent_has_a_phase_for_new_layers(tmp_path):
    full = load_experiment("full").train_recipe("vpdense_80_healed")
    assert (len(full.new_layers), full.new_layers[0], full.new_layers[-1]) == (52, 5, 80)
    assert load_experiment("full").train_recipe("vpdense_28_healed").new_layers == ()
    experiment = load_changed(tmp_path, {"rungs.vpdense_28.healing.new_layers_only_steps": 2})
    with pytest.raises(ConfigError, match=r"vpdense_28\.healing\.new_layers_only_steps"):
        experiment.train_recipe("vpdense_28_healed")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"new_layers": []}, "needs to know them"),
        ({"new_layers_only_steps": 0}, "needs to know them"),
        ({"new_layers": [5, 17]}, "num_layers = 16"),
        ({"new_layers": [6, 5]}, "increasing"),
    ],
)
def test_a_recipe_whose_new_layers_do_not_fit_is_refused(changes, message):
    recipe = plain(load_experiment("smoke").train_recipe("vpdense_80_healed"))
    with pytest.raises(ConfigError, match=message):
        parse(TrainRecipe, recipe | changes)


ABSENT = [
    ("stages.vpmoe_stage1.kd.kl_weight", 0.5),
    ("stages.vpmoe_stage1.kd.rescored", {"tau": 1.0, "w_min": 0.25, "w_max": 4.0}),
    ("stages.vpmoe_stage1.scored_fraction", 0.7),
    ("profiling", {"seq_len": 256, "steps": 6}),
]
"""What a table has no use for, and what no part of the trainer does yet."""


@pytest.mark.parametrize(("key", "value"), ABSENT)
def test_what_cannot_run_is_no_key(tmp_path, key, value):
    assert f"{key}: unknown key" in problems(tmp_path, {key: value})[0]


def test_full_is_the_locked_model():
    full = load_experiment("full")
    arch = full.architecture("vpmoe")
    model, moe = arch.model, arch.moe
    assert (model.num_layers, model.hidden_size, model.num_attention_heads, model.num_query_groups) == (
        80,
        1024,
        8,
        2,
    )
    assert (moe.num_experts, moe.topk, moe.router_num_groups, moe.router_group_topk) == (256, 4, 8, 4)
    assert (model.ffn_hidden_size, dense_ffn_hidden_size(arch), moe.shared_expert_size) == (128, 512, 512)
    assert (
        full.architecture("vpdense_28").model.num_layers,
        full.architecture("vpdense_80").model.num_layers,
    ) == (28, 80)
    assert dense_ffn_hidden_size(load_experiment("bench").architecture("vpmoe")) == 128
    recipe = full.train_recipe("vpmoe_stage1")
    assert recipe.steps * recipe.training.global_batch_size * recipe.seq_len == pytest.approx(1e9, rel=1e-3)
    assert recipe.training.dtype == "bf16"
    assert full.sources.qwen3_0_6b.revision == "c1899de289a04d12100db370d81485cdf75e47ca"


def test_unknown_pins_are_left_empty_load_and_are_refused_at_use():
    sources = load_experiment("full").sources
    assert sources.missing_pins("sources") == [
        "sources.synth.revision",
        "sources.healing_corpus.revision",
        "sources.core8.url",
        "sources.teacher.revision",
        'sources.teacher.files."config.json"',
    ]
    with pytest.raises(ConfigError, match=r"sources\.synth\.revision: not pinned.*40-digit commit"):
        sources.synth.require_pins("sources.synth")
    assert sources.qwen3_0_6b.require_pins("sources.qwen3_0_6b") is sources.qwen3_0_6b


def test_an_empty_file_pin_is_named_with_its_file(tmp_path):
    experiment = load_changed(
        tmp_path,
        {"sources.synth": {"kind": "hub", "repo": "a/b", "revision": "0" * 40, "files": {"x.parquet": ""}}},
    )
    assert experiment.sources.synth.missing_pins("sources.synth") == ['sources.synth.files."x.parquet"']


def test_layer_kinds():
    full = load_experiment("full")
    kinds = layer_kinds(full.architecture("vpdense_80"))
    assert [number for number, kind in enumerate(kinds, 1) if kind == "global"] == list(range(4, 81, 4))
    assert set(layer_kinds(full.architecture("vpdense0_5_28"))) == {"global"}
    raw = plain(full.architecture("vpmoe"))
    raw["model"]["num_layers"] = 3
    raw["attention"]["window_attn_skip_freq"] = [1, 0, 1]
    assert layer_kinds(parse(Architecture, raw)) == ("local", "global", "local")
    assert moe_layers(full.architecture("vpmoe")) == tuple(range(2, 81))
    assert moe_layers(full.architecture("vpdense_80")) == ()


@pytest.mark.parametrize(
    ("wrong", "right", "nearest"),
    [
        ("sources.synth.rowz", "sources.synth.rows", "'rows'"),
        ("data.synth_kd_v1.sequence_len", "data.synth_kd_v1.seq_len", "'seq_len'"),
        ("data.synth_kd_v1.pack.blok", "data.synth_kd_v1.pack.block", "'block'"),
        ("rungs.vpmoe.moe.router_grup_topk", "rungs.vpmoe.moe.router_group_topk", "'router_group_topk'"),
        ("rungs.defaults.model.hiden_size", "rungs.defaults.model.hidden_size", "'hidden_size'"),
        ("training.optimizer.learning", "training.optimizer.lr", "valid here"),
        (
            "stages.vpmoe_stage1.kd.span_weight_reason",
            "stages.vpmoe_stage1.kd.span_weight_reasoning",
            "span_weight",
        ),
        ("evaluation.generation.greed", "evaluation.generation.greedy", "'greedy'"),
        ("rungs.vpdens_28", "rungs.vpdense_28", "'vpdense_28'"),
        ("stages.vpmoe_stag1", "stages.vpmoe_stage1", "'vpmoe_stage1'"),
        ("trainig", "training", "'training'"),
    ],
)
def test_a_misspelt_key_is_named_once_with_its_path_and_the_nearest_valid_key(
    tmp_path, wrong, right, nearest
):
    table = SMOKE
    for name in right.split("."):
        table = table[name]
    found = problems(tmp_path, {wrong: table}, drop=[right])
    assert found[0].startswith(f"{wrong}: unknown key")
    assert nearest in found[0]
    assert sum(problem.startswith(f"{wrong}:") for problem in found) == 1


def test_a_key_in_the_wrong_table_is_pointed_to_its_own(tmp_path):
    (found,) = problems(tmp_path, {"rungs.vpmoe.moe.window_size": 32})
    assert "nearest valid key is 'rungs." in found
    assert ".attention.window_size'" in found


@pytest.mark.parametrize(
    "key",
    [
        "name",
        "seed",
        "sources.tokenizer.sha256",
        "sources.synth.kind",
        "data.synth_kd_v1.valid_fraction",
        "training.optimizer.lr",
        "training.dtype",
        "training.schedule",
        "stages.vpmoe_stage1.steps",
        "stages.vpmoe_stage1",
        "rungs.vpmoe",
        "evaluation.ppl_tokens",
    ],
)
def test_a_missing_key_is_named_with_its_path(tmp_path, key):
    found = problems(tmp_path, {}, drop=[key])
    assert found == (found[0],)
    assert found[0].startswith(f"{key}: missing")


def test_hidden_dropout_must_be_written(tmp_path):
    found = problems(tmp_path, {}, drop=["rungs.defaults.model.hidden_dropout"])
    assert "rungs.vpmoe.model.hidden_dropout: missing; it has no default, so the config must set it" in found


WRONG = [
    ({"rungs.defaults.model.num_attention_heads": 5}, "head_dim × num_attention_heads = 16 × 5 = 80, but hidden_size = 64"),
    ({"rungs.defaults.model.num_query_groups": 3}, "num_attention_heads = 4 is not a multiple of num_query_groups = 3"),
    ({"rungs.defaults.model.softmax_type": "softmax"}, "allowed: 'vanilla', 'off-by-one' or 'learnable'"),
    ({"rungs.defaults.model.activation": "gelu"}, "found 'gelu'; allowed: 'squaredrelu'"),
    ({"rungs.defaults.model.value_residual_init": 1.5}, "value_residual_init: found 1.5; input should be less than or equal to 1"),
    ({"rungs.defaults.model.hidden_dropout": 0.1}, "hidden_dropout = 0.1; allowed: 0.0"),
    ({"rungs.defaults.attention.attention_dropout": 0.1}, "attention_dropout = 0.1; allowed: 0.0"),
    ({"rungs.defaults.attention.window_size": -1}, "rungs.defaults.attention.window_size: found -1"),
    ({"rungs.defaults.attention.max_sequence_length": 512}, "data.synth_kd_v1.seq_len = 1024 is more than"),
    ({"rungs.vpmoe.model.num_layers": 15}, "model.num_layers = 15 is not a multiple of attention.window_attn_skip_freq = 4"),
    ({"rungs.vpmoe.attention": {"window_attn_skip_freq": [1, 0]}}, "lists 2 layers, but model.num_layers = 16"),
    ({"rungs.vpmoe.attention": {"window_size": 0}}, "tpa.use_tpa = true needs attention.window_size > 0"),
    ({"rungs.vpmoe.grape": {"grape_a": False}}, "leaves global layers without positions"),
    ({"rungs.vpmoe.grape": {"grapem_share_across_heads": False}}, "model.num_query_groups = 2 and model.num_attention_heads = 4"),
    ({"rungs.defaults.grape.grapem_log_freq_scale": 0.0}, "grapem_log_freq_scale: found 0.0; input should be greater than 0"),
    ({"rungs.vpdense0_5_28.attention.window_size": 32}, "found attention.window_size = 32 (allowed: 0)"),
    ({"rungs.vpdense0_5_28.tpa.use_tpa": True}, "tpa.use_tpa = true needs attention.window_size > 0"),
    ({"rungs.vpdense0_5_28.grape.grape_a": True}, "found grape.grape_a = true (allowed: false)"),
    ({"rungs.vpdense_28.model.dense_ffn_hidden_size": 99}, "dense_ffn_hidden_size = 99 differs from"),
    ({"rungs.vpdense_28.moe": SMOKE["rungs"]["vpmoe"]["moe"]}, "this rung is dense"),
    ({"rungs.vpmoe.moe.router_num_groups": 3}, "num_experts = 8 is not a multiple of router_num_groups = 3"),
    ({"rungs.vpmoe.moe.router_group_topk": 5}, "router_group_topk = 5 is more than router_num_groups = 4"),
    ({"rungs.vpmoe.moe.topk": 3}, "topk = 3 is not a multiple of router_group_topk = 2"),
    ({"rungs.vpmoe.moe.topk": 6}, "cannot be chosen from router_group_topk = 2 groups of 2"),
    ({"rungs.vpmoe.moe.topk": 9}, "topk = 9 is more than num_experts = 8"),
    ({"rungs.vpmoe.moe.router_score_function": "softmax"}, "needs router_score_function = 'sigmoid'"),
    ({"rungs.vpmoe.moe.router_dtype": "bf16"}, "found 'bf16'; allowed: 'fp32' or 'fp64'"),
    ({"rungs.vpmoe.moe.grouped_gemm": True}, "moe.grouped_gemm = true, but training.backend = 'reference'"),
    ({"rungs.vpmoe.moe.permute_fusion": True}, "does not have it; set moe.permute_fusion = false"),
    ({"rungs.vpmoe.moe.router_fusion": True}, "stages.vpmoe_stage1: rungs.vpmoe.moe.router_fusion = true"),
    ({"training.backend": "tpu"}, "training.backend: found 'tpu'; allowed: 'fused', 'reference'"),
    ({"training.backend": "transformer_engine"}, "training.backend: found 'transformer_engine'; allowed: 'fused', "),
    ({"evaluation.backend": "turbo"}, "evaluation.backend: found 'turbo'; allowed: 'fused', 'reference'"),
    ({"training.optimizer.name": "lion"}, "found 'lion'; allowed: 'normuon'"),
    ({"training.optimizer.polar_express_safety_factor": 0.01}, "needs polar_express_coefficients"),
    ({"training.schedule.kind": "step"}, "allowed: 'cosine', 'linear' or 'constant'"),
    ({"training.global_batch_size": 3, "training.micro_batch_size": 2}, "global_batch_size = 3 is not a multiple"),
    ({"training.global_batch_size": "2"}, "training.global_batch_size: found '2'; input should be a valid integer"),
    ({"training.global_batch_size": True}, "training.global_batch_size: found True"),
    ({"training.clip_grad": float("nan")}, "training.clip_grad: found nan; input should be a finite number"),
    ({"stages.vpmoe_stage1.kd.span_weight_final": -1.0}, "span_weight_final: found -1.0"),
    ({"stages.vpmoe_stage1.kd": {"span_weight_final": 0.0, "span_weight_reasoning": 0.0}}, "nothing would be trained"),
    ({"data.synth_kd_v1.valid_fraction": 1.5}, "data.synth_kd_v1.valid_fraction: found 1.5"),
    ({"data.synth_kd_v1.on_invalid": "skip"}, "found 'skip'; allowed: 'fail'"),
    ({"sources.tokenizer.vocab_size": 200000}, "vocab_size = 200000; allowed: 201088"),
    ({"sources.tokenizer.family": "cl100k"}, "allowed: 'o200k_harmony'"),
    ({"sources.tokenizer.sha256": "abc"}, "expected 64 lower-case hex digits"),
    ({"sources.synth": {"kind": "hub", "repo": "a/b", "revision": "main"}}, "40 hex digits of a commit"),
    ({"sources.synth": {"kind": "magic"}}, "sources.synth.kind: found 'magic'; allowed: 'generated', 'hub', 'parquet'"),
    ({"name": "Smoke Test"}, "name: found 'Smoke Test'"),
    ({"schema": "vpmoe.experiment/2"}, "schema: found 'vpmoe.experiment/2'; allowed: 'vpmoe.experiment/1'"),
]  # fmt: skip


@pytest.mark.parametrize(("changes", "message"), WRONG, ids=lambda value: str(value)[:60])
def test_a_wrong_value_is_refused_with_what_was_found_and_what_is_allowed(tmp_path, changes, message):
    text = "\n".join(problems(tmp_path, changes))
    assert message in text


def test_rope_and_grapem_need_their_base(tmp_path):
    found = problems(tmp_path, {}, drop=["rungs.defaults.grape.rotary_base"])
    assert any("'rope' needs grape.rotary_base" in problem for problem in found)
    assert any("'grapem' needs grape.rotary_base" in problem for problem in found)


@pytest.mark.parametrize("key", ["tpa_rank", "tpa_q_rank"])
def test_tpa_needs_its_ranks(tmp_path, key):
    found = problems(tmp_path, {}, drop=[f"rungs.defaults.tpa.{key}"])
    assert any("needs both tpa_rank and tpa_q_rank" in problem for problem in found)


def test_grape_a_needs_the_skip_frequency(tmp_path):
    found = problems(tmp_path, {}, drop=["rungs.defaults.attention.window_attn_skip_freq"])
    assert any("grape.grape_a = true needs attention.window_attn_skip_freq" in problem for problem in found)


def test_the_group_keys_go_together(tmp_path):
    found = problems(tmp_path, {}, drop=["rungs.vpmoe.moe.router_group_topk"])
    assert any("set together or not at all" in problem for problem in found)


def test_a_fusion_is_accepted_where_the_backend_has_it(tmp_path, monkeypatch):
    backend = add_backend(monkeypatch, tmp_path)
    experiment = load_changed(tmp_path, {"rungs.vpmoe.moe.grouped_gemm": True, "training.backend": backend})
    assert asked_fusions(experiment.architecture("vpmoe").moe) == ("grouped_gemm",)
    found = problems(tmp_path, {"rungs.vpmoe.moe.grouped_gemm": True})
    assert f"set moe.grouped_gemm = false, or training.backend to 'fused' or '{backend}'" in found[0]
    found = problems(tmp_path, {"rungs.vpmoe.moe.permute_fusion": True, "training.backend": backend})
    assert f"moe.permute_fusion = true, but training.backend = '{backend}' does not have it" in found[0]


@pytest.mark.parametrize("name", ["smoke", "full", "bench"])
def test_a_geometry_is_the_architecture_but_for_the_fusions(name):
    plainest = load_experiment(name).architecture("vpmoe")
    flagged = plainest.model_copy(update={"moe": plainest.moe.model_copy(update={"grouped_gemm": True})})
    assert flagged != plainest
    assert geometry(flagged) == geometry(plainest) == plainest
    dense = load_experiment("full").architecture("vpdense_80")
    assert geometry(dense) == dense


def test_coefficients_free_the_safety_factor(tmp_path):
    given_ = {"polar_express_safety_factor": 0.01, "polar_express_coefficients": [[3.0, -2.0, 0.5]]}
    experiment = load_changed(tmp_path, {f"training.optimizer.{key}": value for key, value in given_.items()})
    assert experiment.training.optimizer.polar_express_coefficients == ((3.0, -2.0, 0.5),)
    found = problems(tmp_path, {"training.optimizer.polar_express_coefficients": []})
    assert any("polar_express_coefficients" in problem for problem in found)


def test_tables_cannot_be_changed():
    experiment = load_experiment("smoke")
    with pytest.raises(ValidationError):
        experiment.training.optimizer.lr = 1.0


def test_asking_for_what_the_experiment_does_not_have():
    experiment, bench = load_experiment("smoke"), load_experiment("bench")
    with pytest.raises(ConfigError, match=r"rungs\.vpdense_28: not in this experiment, which has vpmoe"):
        bench.architecture("vpdense_28")
    with pytest.raises(ConfigError, match=r"it is the donor's"):
        experiment.architecture("qwen3_0_6b_o200k")
    with pytest.raises(
        ConfigError, match=r"vpmoe_stage2: not a training run of this experiment, which has vpmoe_stage1"
    ):
        bench.train_recipe("vpmoe_stage2")
    with pytest.raises(ConfigError, match=r"rungs\.vpmoe\.healing: missing"):
        experiment.train_recipe("vpmoe_healed")


def test_files_that_are_no_experiment(tmp_path):
    with pytest.raises(
        ConfigError, match="no experiment called 'smok'; there are bench, full, smoke; did you mean 'smoke'"
    ):
        load_experiment("smok")
    with pytest.raises(ConfigError, match="no such experiment file"):
        load_experiment(tmp_path / "absent.toml")
    (tmp_path / "broken.toml").write_text("a = [1,")
    with pytest.raises(ConfigError, match=r"broken\.toml: not valid TOML"):
        load_experiment(tmp_path / "broken.toml")


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_no_single_wrong_type_anywhere_passes_or_escapes_as_another_error(data):
    """Replace one leaf of the resolved experiment by a value of another type."""
    raw = plain(load_experiment("smoke"))
    node, path = raw, []
    while isinstance(node, dict | list) and node:
        key = data.draw(st.sampled_from(sorted(node) if isinstance(node, dict) else range(len(node))))
        parent, node = node, node[key]
        path.append(key)
    parent[key] = {"unexpected": "table"}
    with pytest.raises(ConfigError) as refused:
        parse(Experiment, raw)
    assert any(str(path[0]) in problem for problem in refused.value.problems)


def job_dict(**changes):
    recipe = plain(load_experiment("smoke").train_recipe("vpmoe_stage1"))
    return {
        "schema": "vpmoe.job/1",
        "command": "train",
        "asset": "vpmoe_stage1",
        "experiment": "smoke",
        "recipe": recipe,
        "recipe_fingerprint": "ab" * 32,
        "seed": 1234,
        "inputs": {"synth_kd_v1": {"path": "/data", "digest": "cd" * 32}},
        "execution": {"device": "cpu"},
        "provenance": {"git_sha": "1" * 40, "git_dirty": False, "source_digest": "s", "lock_digest": "l"},
        "work_dir": "/work",
        "output_dir": "/out",
        **changes,
    }


def test_a_job_reads_back_with_its_recipe(tmp_path):
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job_dict()))
    job = load_job(file)
    assert job.train_recipe() == load_experiment("smoke").train_recipe("vpmoe_stage1")
    assert job.execution == Execution(device="cpu")
    assert parse(Job, plain(job)) == job


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"command": "dance"}, "command: found 'dance'; allowed: 'convert', 'train', 'evaluate', 'score' or 'profile'"),
        ({"command": "bake"}, "command: found 'bake'; allowed: 'convert', 'train', 'evaluate', 'score' or 'profile'"),
        ({"command": "generate"}, "command: found 'generate'; allowed: 'convert', 'train', 'evaluate', 'score' or 'profile'"),
        ({"comand": "train"}, "comand: unknown key; the nearest valid key is 'command'"),
        ({"execution": {"device": "tpu"}}, "execution.device: found 'tpu'; allowed: 'cpu' or 'cuda'"),
        ({"execution": {"device": "cpu", "nproc": 2}}, "nproc = 2, but tp × dp = 1 × 1 = 1"),
        ({"execution": {"device": "cpu", "nproc": 4, "dp": 4, "ep": 3}}, "ep = 3 does not divide dp = 4"),
        ({"execution": {"device": "cpu", "nproc": 4, "tp": 4}}, "execution.tp = 4 does not divide model.num_query_groups = 2"),
        ({"execution": {"device": "cpu", "nproc": 4, "dp": 4}}, "does not divide global_batch_size = 2"),
        ({"provenance": {"git_sha": "", "git_dirty": False, "source_digest": "s", "lock_digest": "l"}}, "provenance.git_sha"),
        ({"recipe": {"steps": 3}}, "recipe: "),
        ({"inputs": {"x": {"path": "p"}}}, "inputs.x.digest: missing"),
        ({"parts": {"x": {"recipe_fingerprint": "f", "work_dir": "w", "output_dir": "o"}}}, "a job of 'train' has none"),
    ],
)  # fmt: skip
def test_a_wrong_job_is_refused_before_anything_starts(tmp_path, changes, message):
    file = tmp_path / "job.json"
    file.write_text(json.dumps(job_dict(**changes)))
    with pytest.raises(ConfigError) as refused:
        load_job(file)
    assert message in str(refused.value)


def test_expert_parallelism_must_divide_the_experts(tmp_path):
    recipe = load_experiment("smoke").train_recipe("vpmoe_stage1")
    training = recipe.training.model_copy(update={"global_batch_size": 3})
    three = Execution(device="cpu", nproc=3, dp=3, ep=3)
    with pytest.raises(ConfigError, match=r"execution\.ep = 3 does not divide moe\.num_experts = 8"):
        three.check_recipe(recipe.model_copy(update={"training": training}))
    dense = load_experiment("smoke").train_recipe("vpdense_28_healed")
    with pytest.raises(ConfigError, match="the model has no experts"):
        Execution(device="cpu", nproc=2, dp=2, ep=2).check_recipe(dense)


def test_jobs_that_are_no_files_or_no_json(tmp_path):
    with pytest.raises(ConfigError, match="no such job file"):
        load_job(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_job(tmp_path / "job.json")
    (tmp_path / "job.json").write_text("[" * 200_000)
    with pytest.raises(ConfigError, match="not valid JSON"):
        load_job(tmp_path / "job.json")
    with pytest.raises(ConfigError, match="cannot be read as a job file: Is a directory"):
        load_job(tmp_path)
    other = parse(Job, job_dict(command="evaluate", recipe={}))
    with pytest.raises(ConfigError, match="only a 'train' job has a training recipe"):
        other.train_recipe()


@settings(max_examples=50, deadline=None)
@given(lr=st.floats(1e-6, 1.0))
def test_scaling_an_optimizer_keeps_the_proportions_of_its_rates(lr):
    base = OptimizerConfig(name="normuon", lr=2e-3, normuon_aux_lr=3e-4)
    scaled = scaled_to(base, lr)
    assert scaled.lr == lr
    assert scaled.normuon_aux_lr / lr == pytest.approx(0.15)
    assert scaled.decoupled_lr is None


def test_a_byte_order_mark_before_an_experiment_or_a_job_is_passed_over(tmp_path):
    smoke = load_experiment("smoke")
    (tmp_path / "smoke.toml").write_text("\ufeff" + smoke.written, encoding="utf-8")
    assert load_experiment(tmp_path / "smoke.toml") == smoke
    job = job_dict()
    (tmp_path / "job.json").write_text("\ufeff" + json.dumps(job), encoding="utf-8")
    assert load_job(tmp_path / "job.json").asset == job["asset"]


def test_an_experiment_keeps_the_text_that_it_was_read_from_and_is_equal_without_it(tmp_path):
    smoke = load_experiment("smoke")
    (tmp_path / "smoke.toml").write_bytes(smoke.written.replace("\n", "\r\n").encode() + b"# mine\r\n")
    mine = load_experiment(tmp_path / "smoke.toml")
    assert mine.written.endswith("# mine\r\n")
    assert mine == smoke
    assert "written" not in mine.model_dump()
