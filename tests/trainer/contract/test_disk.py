"""The disk plan: how many checkpoints lie there at once, and how large one is."""

import itertools

import pytest
import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from trainer.checkpoints.published import sharded_state_dict
from trainer.contract.disk import DRIFT_STEPS, checkpoint_bytes, disk_plan, most_checkpoints, weight_bytes
from trainer.contract.schema.experiment import load_experiment
from trainer.model.gpt import build_model
from trainer.optim.optimizer import Optimizer
from trainer.train import run


def simulated(steps: int, interval: int, keep_last: int, keep_every: int, drift: int | None) -> int:
    """What `trainer.train.run` saves and `Checkpoints` removes, step by step."""
    kept: list[int] = []
    most = 0
    for step in range(steps + 1):
        due = step == drift or (step and (step % interval == 0 or step == steps))
        if not due:
            continue
        kept = sorted({*kept, step})
        most = max(most, len(kept))
        for old in kept[:-keep_last]:
            if old != drift and not (keep_every and old % keep_every == 0):
                kept.remove(old)
    return most


def test_checkpoints_at_once_are_those_of_a_run_played_step_by_step():
    training = load_experiment("smoke").training
    grid = itertools.product((1, 2, 4, 7, 20), (1, 3, 5, 1000), (1, 2, 3), (0, 4, 10), (True, False))
    for steps, interval, last, every, check in grid:
        settings = training.model_copy(
            update={"save_interval": interval, "keep_last": last, "keep_every": every}
        )
        drift = max(0, steps - DRIFT_STEPS) if check else None
        assert most_checkpoints(steps, settings, drift) == simulated(steps, interval, last, every, drift)


def test_the_locked_model_needs_two_checkpoints_of_51_gb_and_12_gb_of_weights():
    """As the full-size run of `bench` was seen to."""
    plan = disk_plan(load_experiment("bench").train_recipe("vpmoe_stage1"))
    assert plan.checkpoint == pytest.approx(51e9, rel=0.01)
    assert plan.checkpoints == 2
    assert plan.weights == pytest.approx(12.04e9, rel=0.001)
    assert plan.total == 2 * plan.checkpoint + plan.weights
    assert run.DRIFT_STEPS == DRIFT_STEPS


@pytest.mark.parametrize("rung", ["vpdense0_5_28", "vpmoe"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_planned_bytes_are_those_of_the_tensors_that_are_written(rung, dtype):
    experiment = load_experiment("smoke")
    training = experiment.training.model_copy(update={"dtype": dtype})
    arch = experiment.architecture(rung)
    model = build_model(arch, dtype={"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    optimizer = Optimizer(model, training.optimizer, clip_grad=1.0)
    state = sharded_state_dict(model)
    published = [value for value in nested_values(state) if isinstance(value, ShardedTensor)]
    assert sum(value.data.nbytes for value in published) == weight_bytes(arch, training)
    saved = [*published, *optimizer.sharded_state_dict(state)["tensors"].values()]
    assert sum(value.data.nbytes for value in saved) == checkpoint_bytes(arch, training)


def test_an_on_policy_run_keeps_every_round_and_the_plan_has_room_for_the_longest():
    """12 bytes a token and 22 a rollout: what a round's file is made of."""
    recipe = load_experiment("full").train_recipe("vpmoe_stage3")
    terms = recipe.rollouts
    rounds = recipe.steps * (terms.buffer_size // (terms.delay + 1))
    plan = disk_plan(recipe)
    assert plan.rollouts == rounds * (12 * terms.max_new_tokens + 22)
    assert plan.total == plan.checkpoint * plan.checkpoints + plan.rollouts + plan.weights
    assert plan.as_dict()["rollouts"] == plan.rollouts
    assert "rollouts" not in disk_plan(load_experiment("full").train_recipe("vpmoe_stage2")).as_dict()
