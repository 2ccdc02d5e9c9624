"""The least that a step does, against torch's own count of operations and against counting by hand."""

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils.flop_counter import FlopCounterMode

from tests.trainer.train.train_jobs import tiny_recipe
from trainer.contract.parameters import count_parameters
from trainer.contract.schema.base import parse
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.training import TrainRecipe
from trainer.model.gpt import build_model
from trainer.profiling import work as counted
from trainer.profiling.kinds import EXPERTS, FFN, OUTPUT, QKV, ROUTER, SHARED, TPA
from trainer.profiling.rates import sheet_flops
from trainer.profiling.work import OPTIMIZER, Work, attended_pairs, model_flops, step_work


@given(st.integers(1, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_pairs_of_a_causal_window_are_those_of_the_mask(length, window):
    query, key = torch.arange(length)[:, None], torch.arange(length)[None]
    mask = (key <= query) & (query - key < (window or length))
    assert attended_pairs(length, window) == int(mask.sum())


def test_products_are_those_that_torch_counts_in_a_forward_pass():
    recipe = parse(TrainRecipe, tiny_recipe())
    model = build_model(recipe.architecture)
    tokens = torch.randint(0, 256, (1, recipe.seq_len))
    positions = torch.arange(recipe.seq_len)[None]
    with FlopCounterMode(display=False, depth=8) as counter:
        model.forward_hidden(tokens, positions, torch.zeros_like(tokens))
    seen: dict[str, int] = {}
    ends = {
        "linear_proj": OUTPUT,
        "linear_qkv": QKV,
        "linear_tpa": TPA,
        "router": ROUTER,
        "mlp.experts": EXPERTS,
        "shared_experts": SHARED,
    }
    for name, operations in counter.get_flop_counts().items():
        for end, kind in ends.items():
            if name.endswith(end):
                seen[kind] = seen.get(kind, 0) + sum(operations.values())
        if name.endswith("layers.0.mlp"):
            seen[FFN] = sum(operations.values())
    work, rows = step_work(recipe), recipe.training.global_batch_size
    expected = {kind: work[kind].flops / 3 / rows for kind in seen}
    assert seen.keys() == {*ends.values(), FFN}
    # Composing q, k and v is no product of matrices in torch's count, where it is fused or broadcast.
    assert {kind: flops for kind, flops in seen.items() if kind != TPA} == {
        kind: flops for kind, flops in expected.items() if kind != TPA
    }
    assert 0.5 * expected[TPA] < seen[TPA] <= expected[TPA] * 1.01


def test_the_locked_model_does_six_operations_a_token_for_each_active_number_of_its_products():
    recipe = load_experiment("bench").profile_recipe()
    work = step_work(recipe)
    tokens = recipe.seq_len * recipe.training.global_batch_size
    count = count_parameters(recipe.architecture)
    products = 6 * (count.active - count.components["embedding"])
    attention = (work["window attention"].flops + work["global attention"].flops) / tokens
    assert model_flops(work) / tokens == pytest.approx(products + attention, rel=0.02)
    assert 3.5e9 < model_flops(work) / tokens < 3.9e9


def test_the_optimizers_least_traffic_is_that_of_its_tensors():
    recipe = load_experiment("bench").profile_recipe()
    moved = step_work(recipe)[OPTIMIZER].bytes
    count = count_parameters(recipe.architecture)
    tables = count.components["embedding"] + count.components["output head"]
    by_hand = (
        16 * count.total + 16 * tables + 4 * (count.total - tables)
    )  # bf16 momentum, AdamW of the tables
    assert moved == pytest.approx(by_hand, rel=0.01)


def test_a_floor_is_what_takes_longer():
    assert Work(2e12, 1e9).floor_ms(1e12, 1e12) == pytest.approx(2000)
    assert Work(2e9, 3e12).floor_ms(1e12, 1e12) == pytest.approx(3000)
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)
    assert counted.POLAR_EXPRESS_ITERATIONS == 5


@pytest.mark.parametrize(
    ("name", "flops"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("RTX", None),
    ],
)
def test_the_data_sheet_of_a_card_is_found_by_its_name(name: str, flops: Any):
    assert sheet_flops(name) == flops
