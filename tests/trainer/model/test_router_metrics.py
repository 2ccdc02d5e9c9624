import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.model.router_metrics import router_health, router_metrics


def test_router_health_of_the_worked_example():
    health = router_health([10, 10, 0, 0], [-1, 2, 0, 1])
    assert health == pytest.approx(
        {
            "cv_pct": 100.0,
            "entropy": math.log(2),
            "max_load_pct": 50.0,
            "experts_active": 2,
            "dead_experts": 2,
            "bias_range": 3.0,
        },
        abs=1e-9,
    )


def test_a_layer_without_tokens_is_all_dead_and_has_no_nan():
    assert router_health([0, 0, 0], None) == {
        "cv_pct": 0.0,
        "entropy": 0.0,
        "max_load_pct": 0.0,
        "experts_active": 0.0,
        "dead_experts": 3.0,
    }


def test_aggregates_follow_their_definitions():
    counts, bias = [[10, 10, 0, 0], [5, 5, 5, 5]], [[-1.0, 2.0, 0.0, 1.0], [0.0, 0.0, 0.0, 4.0]]
    found = router_metrics(counts, bias, [2, 5])
    assert found == pytest.approx(
        {
            "moe/router_agg/mean_cv_pct": 50.0,
            "moe/router_agg/std_cv_pct": 50.0,
            "moe/router_agg/mean_entropy": (math.log(2) + math.log(4)) / 2,
            "moe/router_agg/min_entropy": math.log(2),
            "moe/router_agg/mean_max_load_pct": 37.5,
            "moe/router_agg/dead_experts_count": 2.0,
            "moe/router_agg/experts_active_mean": 3.0,
            "moe/router_agg/expert_bias_range": 5.0,  # 4 in one layer, -1 in the other
        },
        abs=1e-9,
    )


def test_layers_are_named_by_their_own_numbers_only_when_asked():
    counts, bias = [[10, 10, 0, 0], [5, 5, 5, 5]], [[-1.0, 2.0, 0.0, 1.0], [0.0] * 4]
    assert not any("/layer_" in name for name in router_metrics(counts, bias, [2, 5]))
    found = router_metrics(counts, bias, [2, 5], per_layer=True)
    names = ("cv_pct", "entropy", "max_load_pct", "experts_active", "dead_experts", "bias_range")
    for layer, row, own in zip((2, 5), counts, bias, strict=True):
        health = router_health(row, own)
        assert {name: found[f"moe/router/layer_{layer}/{name}"] for name in names} == health
    assert len(found) == 8 + 2 * 6


def test_without_expert_bias_there_is_no_bias_range():
    found = router_metrics([[1, 2]], None, [2], per_layer=True)
    assert not [name for name in found if "bias" in name]


def test_a_dense_model_has_no_router_metrics():
    assert router_metrics(np.zeros((0, 8)), None, []) == {}


@given(st.lists(st.integers(0, 10_000), min_size=1, max_size=64))
def test_router_health_is_finite_and_within_bounds(counts):
    health = router_health(counts, None)
    assert all(math.isfinite(value) for value in health.values())
    assert health["experts_active"] + health["dead_experts"] == len(counts)
    assert -1e-9 <= health["entropy"] <= math.log(len(counts)) + 1e-9
    if sum(counts):
        assert 100 / len(counts) - 1e-9 <= health["max_load_pct"] <= 100
