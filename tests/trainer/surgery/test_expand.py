"""Depth expansion: the deeper model is the same function, and its new layers are ready to learn."""

import math

import pytest
import torch

from tests.trainer.surgery.surgery_cases import (
    convert_job,
    expand_recipe,
    files,
    loaded,
    morphed,
    payload,
    publish_as,
    random_batch,
    run,
    summary,
)
from trainer.contract.depth import inserted_layers
from trainer.surgery.weights import WeightsReader


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize(("parent", "target"), [(8, 16), (4, 12)])
def test_logits_are_bit_identical(dtype, parent, target, tmp_path):
    source = publish_as(morphed(num_layers=parent), tmp_path / "parent", dtype)
    job = convert_job(tmp_path, expand_recipe(parent, target, dtype=dtype, parent_dtype=dtype), parent=source)
    assert run(job) == 0
    with torch.no_grad():
        models = [
            loaded(morphed(num_layers=parent), source, dtype),
            loaded(morphed(num_layers=target), payload(job), dtype),
        ]
        for seed in range(3):
            before, after = (model(*random_batch(seed)) for model in models)
            assert before.abs().max() > 0.5
            assert torch.equal(before, after)
    check = summary(job)["checks"]["logits_bit_identical"]
    assert check["passed"]
    assert check["metadata"]["max_abs_difference"] == 0.0


def test_a_new_layer_copies_the_nearest_old_one_and_adds_nothing(tmp_path):
    source = publish_as(morphed(num_layers=8), tmp_path / "parent", "fp32")
    job = convert_job(tmp_path, expand_recipe(), parent=source)
    assert run(job) == 0
    report = summary(job)
    assert report["transform"]["inserted_layers"] == list(inserted_layers(8, 16))
    zeroed = {
        "self_attention.linear_proj.weight",
        "self_attention.linear_proj.bias",
        "mlp.linear_fc2.weight",
        "mlp.linear_fc2.bias",
    }
    origin = {1: 1, 5: 1, 6: 2, 8: 4, 9: 5, 12: 8, 13: 5, 16: 8}
    with WeightsReader(source) as parent, WeightsReader(payload(job)) as result:
        for layer, from_layer in origin.items():
            prefix, old = f"decoder.layers.{layer - 1}.", f"decoder.layers.{from_layer - 1}."
            parts = [name.removeprefix(prefix) for name in result.names if name.startswith(prefix)]
            assert len(parts) > 10
            for part in parts:
                value = result.read(prefix + part)
                if part in zeroed and layer in inserted_layers(8, 16):
                    assert not value.any()
                elif part == "self_attention.value_residual_logit" and layer == 5:
                    assert value == pytest.approx(math.log(0.99 / 0.01)), "layer 1 has none to copy"
                else:
                    assert torch.equal(value, parent.read(old + part)), (layer, part)
    changes = {row["layer"]: row["residual_change"] for row in report["layers"]}
    assert {layer for layer, change in changes.items() if change == 0.0} == set(inserted_layers(8, 16))


def test_the_same_job_gives_the_same_bytes(tmp_path):
    source = publish_as(morphed(num_layers=8), tmp_path / "parent", "fp32")
    jobs = [convert_job(tmp_path, expand_recipe(), name, parent=source) for name in "ab"]
    assert [run(job) for job in jobs] == [0, 0]
    assert files(payload(jobs[0])) == files(payload(jobs[1]))
