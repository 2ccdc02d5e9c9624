"""The table of parameters against built models: every rung, every switch, parallel layouts."""

import json
import subprocess
import sys

import pytest
import torch

from trainer.contract.layers import layer_kinds
from trainer.contract.parameters import COMPONENTS, count_parameters, parameters
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse, plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.rungs.rung import RungConfig
from trainer.model.gpt import build_model
from trainer.optim.routing import route_model

PUBLISHED = {
    ("bench", "vpmoe"): (6_021_784_719, 5_609_956_495, 780_087_951, 368_259_727),
    ("full", "vpmoe"): (6_022_571_535, 5_610_743_311, 780_874_767, 369_046_543),
    ("full", "vpdense0_5_28"): (514_768_896, 102_940_672, 514_768_896, 102_940_672),
    ("full", "vpdense_28"): (504_619_323, 92_791_099, 504_619_323, 92_791_099),
    ("full", "vpdense_80"): (676_943_631, 265_115_407, 676_943_631, 265_115_407),
}
RUNGS = [
    (config, name)
    for config in ("smoke", "full", "bench")
    for name, table in load_experiment(config).rungs.items()
    if isinstance(table, RungConfig)
]


def changed(arch: Architecture, **tables) -> Architecture:
    tree = plain(arch)
    for name, keys in tables.items():
        tree[name].update(keys)
    return parse(Architecture, tree)


def figures(found) -> tuple[int, int, int, int]:
    return found.total, found.non_embedding, found.active, found.active_non_embedding


def agrees(arch: Architecture) -> None:
    """Names, order, shapes, float32 and the optimizer's groups are those of the model on the meta device."""
    model = build_model(arch, device="meta", dtype=torch.bfloat16)
    built = dict(model.named_parameters())
    table = {entry.name: entry for entry in parameters(arch)}
    assert list(table) == list(built)
    assert {name: entry.shape for name, entry in table.items()} == {
        n: tuple(p.shape) for n, p in built.items()
    }
    assert {n for n, e in table.items() if e.float32} == {
        n for n, p in built.items() if p.dtype == torch.float32
    }
    routed = route_model(model.named_parameters(), load_experiment("smoke").training.optimizer)
    assert {n: e.kind for n, e in table.items()} == {entry.name: entry.route.kind for entry in routed}
    count = count_parameters(arch)
    assert count.total == sum(p.numel() for p in built.values())
    assert tuple(count.components) == COMPONENTS
    biases = [b for name, b in model.named_buffers() if name.endswith("expert_bias")]
    assert count.expert_bias_entries == sum(b.numel() for b in biases)


@pytest.mark.parametrize(("config", "rung"), PUBLISHED)
def test_published_counts(config, rung):
    assert figures(count_parameters(load_experiment(config).architecture(rung))) == PUBLISHED[config, rung]


@pytest.mark.parametrize(("config", "rung"), RUNGS)
def test_the_table_of_every_rung_is_that_of_the_built_model(config, rung):
    agrees(load_experiment(config).architecture(rung))


SWITCHES = [
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
def test_the_table_follows_every_switch(change):
    agrees(changed(load_experiment("smoke").architecture("vpmoe"), **change))


def test_breakdown_of_the_locked_model():
    arch = load_experiment("bench").architecture("vpmoe")
    found = count_parameters(arch)
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
    # Layer kinds are told apart: a factored projection of a local layer, a whole one of a global layer.
    kinds = layer_kinds(arch)
    for entry in parameters(arch):
        if ".linear_tpa." in entry.name or ".linear_qkv." in entry.name:
            assert entry.component == f"{kinds[int(entry.name.split('.')[2])]} attention"


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
    assert figures(count_parameters(small)) == (463_486_071, 51_657_847, 437_683_063, 25_854_839)
    compat = load_experiment("full").architecture("vpdense0_5_28")
    with_sinks = changed(compat, model={"softmax_type": "learnable", "value_residual": True})
    assert count_parameters(with_sinks).total == 514_769_147


LAYOUTS = [(1, 1, 1), (2, 1, 1), (2, 1, 2), (2, 2, 1), (4, 2, 2), (8, 1, 8)]
"""`dp`, `tp`, `ep`."""

AS_ANY_RANK = """
import json, sys, warnings
import torch, torch.distributed as dist
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore
from trainer.contract.memory import Layout, memory_plan
from tests.trainer.optim.optim_models import state_bytes
from trainer.contract.schema.experiment import load_experiment
from trainer.model.gpt import build_model
from trainer.optim.optimizer import Optimizer
warnings.filterwarnings("ignore")

experiment = load_experiment("smoke")
training = experiment.training.model_copy(update={"dtype": "bf16"})
found = []
for rung in json.loads(sys.argv[1]):
    arch = experiment.architecture(rung)
    for dp, tp, ep in json.loads(sys.argv[2]):
        if arch.moe is None and ep > 1:
            continue
        shapes, states = [], []
        for rank in range(dp * tp):
            dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=dp * tp)
            parallel_state.initialize_model_parallel(
                tp, expert_model_parallel_size=ep, expert_tensor_parallel_size=1,
                create_gloo_process_groups=False,
            )
            model = build_model(arch, dtype=torch.bfloat16, device="meta")
            optimizer = Optimizer(model, training.optimizer, clip_grad=1.0)
            shapes.append([(name, list(p.shape)) for name, p in model.named_parameters()])
            weights = sum(p.numel() * p.element_size() for p in model.parameters())
            states.append([weights, state_bytes(optimizer)])
            optimizer.close()
            parallel_state.destroy_model_parallel()
            dist.destroy_process_group()
        found.append([rung, [dp, tp, ep], shapes, states])
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def ranks():
    """Shapes, weight bytes and optimizer bytes of every rank of every layout, without other processes."""
    rungs = ["vpdense0_5_28", "vpmoe"]
    done = subprocess.run(
        [sys.executable, "-c", AS_ANY_RANK, json.dumps(rungs), json.dumps(LAYOUTS)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_local_shapes_are_those_of_every_rank_of_a_layout(ranks):
    assert len(ranks) == 2 * len(LAYOUTS) - sum(ep > 1 for _, _, ep in LAYOUTS)
    for rung, (_, tp, ep), shapes, _ in ranks:
        arch = load_experiment("smoke").architecture(rung)
        wanted = [[entry.name, list(entry.local_shape(tp, ep))] for entry in parameters(arch)]
        assert all(shape == wanted for shape in shapes)


def test_the_memory_plan_is_that_of_the_fullest_rank(ranks):
    from trainer.contract.memory import Layout, memory_plan

    experiment = load_experiment("smoke")
    training = experiment.training.model_copy(update={"dtype": "bf16"})
    for rung, (dp, tp, ep), _, states in ranks:
        arch = experiment.architecture(rung)
        plan = memory_plan(arch, training, Layout(dp, tp, ep), seq_len=64)
        assert plan.weights == max(weights for weights, _ in states)
        planned = plan.master + plan.momentum + plan.row_second_moments + plan.adam
        fullest = max(state for _, state in states)
        if ep == tp == 1:
            assert planned == fullest
        else:  # where experts have a group of their own, the plan adds up the fullest of both groups
            assert fullest <= planned < 1.03 * fullest
