import json
import tomllib
from pathlib import Path

import pytest
import torch

from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse
from trainer.contract.schema.experiment import CONFIGS_DIR, load_experiment
from trainer.count import command
from trainer.count.memory import memory_plan
from trainer.count.parameters import COMPONENTS, count_built, count_by_formula
from trainer.model.gpt import build_model
from trainer.optim.optimizer import Optimizer

PUBLISHED = {
    ("bench", "vpmoe"): (6_021_784_719, 5_609_956_495, 780_087_951, 368_259_727),
    ("full", "vpmoe"): (6_022_571_535, 5_610_743_311, 780_874_767, 369_046_543),
    ("full", "vpdense0_5_28"): (514_768_896, 102_940_672, 514_768_896, 102_940_672),
    ("full", "vpdense_28"): (504_619_323, 92_791_099, 504_619_323, 92_791_099),
    ("full", "vpdense_80"): (676_943_631, 265_115_407, 676_943_631, 265_115_407),
}


def changed(arch: Architecture, **tables) -> Architecture:
    plain = arch.model_dump()
    for name, keys in tables.items():
        plain[name].update(keys)
    return parse(Architecture, plain)


def figures(found) -> tuple[int, int, int, int]:
    return found.total, found.non_embedding, found.active, found.active_non_embedding


@pytest.mark.parametrize(("config", "rung"), PUBLISHED)
def test_published_counts_come_out_of_the_formula(config, rung):
    found = count_by_formula(load_experiment(config).architecture(rung))
    assert figures(found) == PUBLISHED[config, rung]


@pytest.mark.parametrize(("config", "rung"), PUBLISHED)
def test_published_counts_come_out_of_the_built_model(config, rung):
    arch = load_experiment(config).architecture(rung)
    model = build_model(arch, device="meta", dtype=torch.bfloat16)
    assert sum(p.numel() for p in model.parameters()) == PUBLISHED[config, rung][0]
    assert count_built(arch, model.named_parameters()) == count_by_formula(arch)
    biases = [name for name, _ in model.named_buffers() if name.endswith("expert_bias")]
    assert len(biases) == (79 if rung == "vpmoe" else 0)


def test_breakdown_of_the_locked_model():
    found = count_by_formula(load_experiment("bench").architecture("vpmoe"))
    assert found.components == {
        "embedding": 205_914_112,
        "output head": 205_914_112,
        "local attention": 128_440_320,
        "global attention": 52_480_000,
        "dense FFN": 263_296,
        "routed experts": 5_324_898_304,
        "shared experts": 82_958_848,
        "routers": 20_729_600,
        "norms": 164_864,
        "q/k norms": 20_480,
        "softmax offsets": 640,
        "value residual": 79,
        "GRAPE-M": 64,
    }
    assert found.expert_bias_entries == 79 * 256


def test_variants_of_the_locked_model():
    arch = load_experiment("bench").architecture("vpmoe")
    small = changed(
        arch,
        model={"num_layers": 8},
        moe={
            "num_experts": 16,
            "topk": 2,
            "shared_expert_size": 256,
            "router_num_groups": 2,
            "router_group_topk": 1,
        },
    )
    assert figures(count_by_formula(small)) == (463_486_071, 51_657_847, 437_683_063, 25_854_839)
    compat = load_experiment("full").architecture("vpdense0_5_28")
    with_sinks = changed(compat, model={"softmax_type": "learnable", "value_residual": True})
    assert count_by_formula(with_sinks).total == 514_769_147


SWITCHES = [
    {},
    {"model": {"add_bias_linear": False}},
    {"model": {"add_bias_linear": False, "add_qkv_bias": False}},
    {"model": {"qk_layernorm": False}},
    {"model": {"softmax_type": "off-by-one"}},
    {"model": {"value_residual": False}},
    {"tpa": {"use_tpa": False}},
    {"attention": {"window_attn_skip_freq": [1] * 3 + [0] * 13}},
    {"model": {"num_query_groups": 4}, "grape": {"grapem_share_across_heads": False}},
    {"moe": {"shared_expert": False}},
    {"moe": {"first_layer_dense": False}},
    {"moe": {"router_enable_expert_bias": False}},
]


@pytest.mark.parametrize("change", SWITCHES, ids=str)
def test_formula_equals_a_built_model_with_any_switch(change):
    arch = changed(load_experiment("smoke").architecture("vpmoe"), **change)
    model = build_model(arch, device="meta")
    formula = count_by_formula(arch)
    assert formula == count_built(arch, model.named_parameters())
    assert formula.total == sum(p.numel() for p in model.parameters())
    assert tuple(formula.components) == COMPONENTS
    buffers = sum(b.numel() for name, b in model.named_buffers() if name.endswith("expert_bias"))
    assert formula.expert_bias_entries == buffers


def test_memory_of_one_gpu_is_what_a_parameter_costs():
    """14 bytes for a bf16 matrix (2 + 4 + 4 + 4) and its row moments; 18 for what AdamW updates."""
    experiment = load_experiment("bench")
    model = build_model(experiment.architecture("vpmoe"), device="meta", dtype=torch.bfloat16)
    named = list(model.named_parameters())
    plan = memory_plan(named, experiment.training.optimizer, dp=1, shard=False)
    fp32 = 79 + 64  # ω and log_freq: no master copy, and 4 bytes in the model
    assert plan.weights == 2 * 6_021_784_719 + 2 * fp32
    assert plan.gradients == 4 * 6_021_784_719
    assert plan.master == 4 * (6_021_784_719 - fp32)
    matrices = sum(
        p.numel()
        for name, p in named
        if p.ndim >= 2
        and not name.endswith(("bias1", "bias2"))
        and "embed" not in name
        and "output_layer" not in name
    )
    assert plan.momentum == 4 * matrices
    assert plan.adam == 8 * (6_021_784_719 - matrices)
    assert plan.total / 2**30 == pytest.approx(80.2, abs=0.1)


def test_planned_state_is_what_the_optimizer_allocates():
    experiment = load_experiment("smoke")
    settings = experiment.training.optimizer
    model = build_model(experiment.architecture("vpmoe"), dtype=torch.bfloat16)
    planned = memory_plan(model.named_parameters(), settings, dp=1, shard=True)
    state = planned.master + planned.momentum + planned.row_second_moments + planned.adam
    assert state == Optimizer(model, settings, clip_grad=1.0).state_bytes()


def test_sharding_spreads_state_and_nothing_else():
    experiment = load_experiment("full")
    model = build_model(experiment.architecture("vpmoe"), device="meta", dtype=torch.bfloat16)
    named, settings = list(model.named_parameters()), experiment.training.optimizer
    one, replicated, sharded = (
        memory_plan(named, settings, dp=dp, shard=shard) for dp, shard in ((1, False), (8, False), (8, True))
    )
    assert replicated.total == one.total
    assert (sharded.weights, sharded.gradients) == (one.weights, one.gradients)
    state = one.total - one.weights - one.gradients
    spread = sharded.total - sharded.weights - sharded.gradients
    assert state / 8 <= spread < 1.02 * state / 8
    assert memory_plan(named, settings, dp=1, shard=True).total == one.total


def test_command_prints_json(capsys):
    assert command.main(["bench", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["experiment"] == "bench"
    rung = report["rungs"]["vpmoe"]
    assert (rung["total"], rung["active"], rung["active_non_embedding"]) == (
        6_021_784_719,
        780_087_951,
        368_259_727,
    )
    assert sum(rung["components"].values()) == rung["total"]
    assert [(plan["dp"], plan["sharded"]) for plan in rung["memory_bytes_per_gpu"]] == list(command.LAYOUTS)


def test_command_prints_tables(capsys):
    assert command.main(["full", "--rung", "vpdense_80"]) == 0
    printed = capsys.readouterr().out
    assert "676,943,631" in printed
    assert "DP=8, sharded" in printed
    assert "vpmoe" not in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nonesuch"], "nonesuch"),
        (["smoke", "--rung", "vpdense_81"], "vpdense_81"),
        (["smoke", "--rung", "qwen3_0_6b_o200k"], "has no geometry of its own"),
    ],
)
def test_command_explains_what_it_cannot_count(arguments, message, capsys):
    assert command.main(arguments) == 1
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.out == ""


def test_command_says_when_formula_and_model_disagree(monkeypatch, capsys):
    formula = command.count_by_formula

    def wrong(arch):
        found = formula(arch)
        found.components["routers"] += 1
        return found

    monkeypatch.setattr(command, "count_by_formula", wrong)
    assert command.main(["smoke", "--rung", "vpmoe"]) == 1
    assert "the formula and the built model disagree on routers: formula" in capsys.readouterr().err


def test_command_takes_a_path(tmp_path: Path, capsys):
    text = (CONFIGS_DIR / "bench.toml").read_text()
    path = tmp_path / "mine.toml"
    path.write_text(
        text.replace('name = "bench"', 'name = "mine"').replace("num_experts = 256", "num_experts = 128")
    )
    assert tomllib.loads(path.read_text())["rungs"]["vpmoe"]["moe"]["num_experts"] == 128
    assert command.main([str(path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["rungs"]["vpmoe"]["total"] < 4_000_000_000
