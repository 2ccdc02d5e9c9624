"""Router health of a checkpoint, counted by looking at what each router chooses."""

import numpy as np
import pytest
import torch

from tests.trainer.evaluate.evaluation_inputs import architecture, context, write_conversations
from tests.trainer.evaluate.test_core8 import recipe
from trainer.data.indexed import SpanDocuments
from trainer.evaluate import router_health
from trainer.evaluate.router_health import run


def test_counts_are_those_of_the_routers_choices_on_whole_conversations(student, tmp_path, monkeypatch):
    monkeypatch.setattr(router_health, "BATCH_TOKENS", 50)
    talk = write_conversations(tmp_path / "talk", [30, 24, 40])
    found = run(student, recipe(), context(tmp_path, synth_kd_v1=talk))
    chosen: list[torch.Tensor] = []
    hooks = [
        layer.router.register_forward_hook(lambda _, __, output: chosen.append(output[1]))
        for layer in student.module.moe_layers
    ]
    documents = SpanDocuments(talk, "valid")
    for number in range(2):
        ids = torch.from_numpy(documents[number].tokens).long()[None]
        student.hidden(ids, torch.tensor([ids.shape[1]]))
    for hook in hooks:
        hook.remove()
    layers = student.module.moe_layer_numbers
    experts = architecture().moe.num_experts
    assert (found.report["tokens"], found.report["conversations"]) == (54, 2)
    assert [layer["layer"] for layer in found.report["layers"]] == layers
    dead = 0
    for place, layer in enumerate(found.report["layers"]):
        counts = sum(
            np.bincount(indices.flatten(), minlength=experts) for indices in chosen[place :: len(layers)]
        )
        assert layer["max_load_pct"] == pytest.approx(100 * counts.max() / counts.sum())
        assert layer["dead_experts"] == (counts == 0).sum()
        dead += (counts == 0).sum()
    assert found.metrics["moe/router_agg/dead_experts_count"] == dead
    assert found.metrics["moe/router_agg/mean_balance_loss"] >= 0.5
    assert not student.module.training
    assert student.module.router_counts().sum() == 0
    assert run(student, recipe(), context(tmp_path, synth_kd_v1=talk)) == found


def test_a_checkpoint_without_routers_is_refused(llama, tmp_path):
    with pytest.raises(ValueError, match="no router"):
        run(llama, recipe(), context(tmp_path))
