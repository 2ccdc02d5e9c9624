"""The memory plan: what a parameter costs, what the optimizer allocates, what a full-size step took."""

import pytest
import torch

from tests.trainer.optim.optim_models import state_bytes
from trainer.contract import memory
from trainer.contract.memory import Layout, MemoryPlan, memory_plan
from trainer.contract.parameters import parameters
from trainer.contract.schema.experiment import load_experiment
from trainer.model.gpt import build_model
from trainer.optim import elementwise, matrices
from trainer.optim.optimizer import Optimizer


def planned(config: str, layout: Layout, momentum: str = "fp32", **options) -> MemoryPlan:
    """Of the backend `reference`, whatever the experiment's."""
    experiment = load_experiment(config)
    optimizer = experiment.training.optimizer.model_copy(update={"momentum_dtype": momentum})
    words = {"optimizer": optimizer, "dtype": "bf16", "backend": "reference"}
    training = experiment.training.model_copy(update=words)
    return memory_plan(experiment.architecture("vpmoe"), training, layout, seq_len=2048, **options)


def test_memory_of_one_gpu_is_what_a_parameter_costs():
    """14 bytes for a bf16 matrix (2 + 4 + 4 + 4) and its row moments; 18 for what AdamW updates."""
    plan = planned("bench", Layout(), shard=False)
    table = parameters(load_experiment("bench").architecture("vpmoe"))
    fp32 = 79 + 64  # ω and log_freq: no master copy, and 4 bytes in the model
    assert plan.weights == 2 * 6_021_784_719 + 2 * fp32
    assert plan.gradients == 4 * 6_021_784_719
    assert plan.master == 4 * (6_021_784_719 - fp32)
    in_matrices = sum(
        entry.elements
        for entry in table
        if len(entry.shape) >= 2
        and not entry.name.endswith(("bias1", "bias2"))
        and "embed" not in entry.name
        and "output_layer" not in entry.name
    )
    assert plan.momentum == 4 * in_matrices
    assert plan.adam == 8 * (6_021_784_719 - in_matrices)
    assert plan.state / 2**30 == pytest.approx(80.2, abs=0.1)


def test_a_full_size_step_takes_what_was_measured_on_an_h200():
    """Measured at commit 682cd9e, bf16 momentum: 69.8 GiB after building, 83.4 GiB reserved at the peak."""
    plan = planned("bench", Layout(), "bf16")
    assert plan.state / 2**30 == pytest.approx(69.8, abs=0.1)
    assert plan.total / 2**30 == pytest.approx(83.4, rel=0.01)


def test_low_halves_of_masters_are_half_of_them_and_nothing_else_of_the_state_differs():
    experiment = load_experiment("bench")
    recipe = experiment.train_recipe("vpmoe_stage1")
    plain, low = (
        memory_plan(
            recipe.architecture,
            recipe.training.model_copy(update={"backend": backend}),
            Layout(),
            seq_len=recipe.seq_len,
        )
        for backend in ("reference", "fused")
    )
    assert plain.master == 2 * low.master == 4 * (6_021_784_719 - 79 - 64)
    assert plain.state - plain.master == low.state - low.master
    assert low.total < 67 * 2**30


def test_bench_fits_its_card():
    experiment = load_experiment("bench")
    recipe = experiment.train_recipe("vpmoe_stage1")
    assert recipe.training.optimizer.momentum_dtype == "bf16"
    fused = memory_plan(recipe.architecture, recipe.training, Layout(), seq_len=recipe.seq_len)
    one, two = (planned("bench", Layout(dp), "bf16") for dp in (1, 2))
    assert fused.total < two.total + 3 * 2**30 < 79 * 2**30 < one.total < 139 * 2**30


def test_planned_state_is_what_the_optimizer_allocates():
    experiment = load_experiment("smoke")
    training = experiment.training.model_copy(update={"dtype": "bf16"})
    arch = experiment.architecture("vpmoe")
    plan = memory_plan(arch, training, Layout(), seq_len=64)
    model = build_model(arch, dtype=torch.bfloat16)
    optimizer = Optimizer(model, training.optimizer, clip_grad=1.0)
    assert plan.master + plan.momentum + plan.row_second_moments + plan.adam == state_bytes(optimizer)
    gradients = sum(parameter.main_grad.nbytes for parameter in model.parameters())
    assert plan.gradients == gradients


def test_sharding_spreads_state_and_nothing_else():
    one, replicated, sharded = (
        planned("full", Layout(dp), shard=shard) for dp, shard in ((1, False), (8, False), (8, True))
    )
    assert replicated.total == one.total
    assert (sharded.weights, sharded.gradients) == (one.weights, one.gradients)
    state = one.state - one.weights - one.gradients
    spread = sharded.state - sharded.weights - sharded.gradients
    assert state / 8 <= spread < 1.02 * state / 8
    assert planned("full", Layout(1), shard=True).total == one.total


def test_the_chunks_are_those_of_the_optimizer():
    assert matrices.CHUNK_ELEMENTS == elementwise.CHUNK_ELEMENTS == memory.OPTIMIZER_CHUNK


def test_experts_alone_are_spread_by_expert_parallelism():
    whole, spread = planned("full", Layout(8)), planned("full", Layout(8, 1, 8))
    experts = 5_324_898_304
    assert whole.weights - spread.weights == 2 * experts * 7 // 8
    assert spread.activations == pytest.approx(whole.activations, rel=0.02)
