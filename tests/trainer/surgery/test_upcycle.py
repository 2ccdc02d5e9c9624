"""Dense to experts: the same function at gain 0, the same in expectation at any gain, experts that differ."""

import pytest
import torch
from torch import nn

from tests.trainer.surgery.surgery_cases import (
    convert_job,
    files,
    loaded,
    morphed,
    payload,
    publish_as,
    random_batch,
    routed,
    run,
    summary,
    upcycle_recipe,
)
from trainer.contract.layers import moe_layers
from trainer.contract.schema.architecture import Architecture
from trainer.model.config import squared_relu
from trainer.surgery.weights import WeightsReader

LAYER = "decoder.layers.2.mlp."
"""Of an MoE layer, 0-based."""


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return publish_as(morphed(), tmp_path_factory.mktemp("upcycle") / "parent", "fp32")


def read(directory, *names):
    with WeightsReader(directory) as reader:
        return [reader.read(LAYER + name) for name in names]


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("moe", [{}, {"first_layer_dense": False}])
def test_logits_are_bit_identical_at_gain_zero(dtype, moe, tmp_path):
    source = publish_as(morphed(), tmp_path / "parent", dtype)
    target = routed(**moe)
    recipe = upcycle_recipe(target) | {"dtype": dtype, "parent_dtype": dtype}
    job = convert_job(tmp_path, recipe, parent=source)
    assert run(job) == 0
    with torch.no_grad():
        models = [loaded(morphed(), source, dtype), loaded(target, payload(job), dtype)]
        assert list(models[1].moe_layer_numbers) == list(moe_layers(target))
        for seed in range(3):
            before, after = (model(*random_batch(seed)) for model in models)
            assert before.abs().max() > 0.5
            assert torch.equal(before, after)
    check = summary(job)["checks"]["logits_bit_identical"]
    assert check["passed"]
    assert check["metadata"]["max_abs_difference"] == 0.0


def test_at_gain_zero_only_the_output_projection_learns_and_it_does_at_once(parent, tmp_path):
    job = convert_job(tmp_path, upcycle_recipe(), parent=parent)
    assert run(job) == 0
    model = loaded(routed(), payload(job)).train()
    model(*random_batch()).square().mean().backward()
    experts = model.moe_layers[1].experts
    assert experts.weight2.grad.abs().max() > 0
    assert not experts.weight1.grad.any()


def test_experts_are_slices_of_the_dense_neurons_plus_noise_of_the_asked_size(parent, tmp_path):
    jobs = {
        noise: convert_job(tmp_path, upcycle_recipe(expert_noise=noise), str(noise), parent=parent)
        for noise in (0.0, 0.02)
    }
    assert [run(job) for job in jobs.values()] == [0, 0]
    fc1, bias1 = read(parent, "linear_fc1.weight", "linear_fc1.bias")
    exact, exact_bias = read(payload(jobs[0.0]), "experts.weight1", "experts.bias1")
    noisy, noisy_bias = read(payload(jobs[0.02]), "experts.weight1", "experts.bias1")
    for expert in range(8):
        rows = slice(expert % 4 * 3, expert % 4 * 3 + 3)
        assert torch.equal(exact[expert], fc1[rows])
        assert torch.equal(exact_bias[expert], bias1[rows])
    added = noisy - exact
    size = 0.02 * fc1.square().mean().sqrt()
    assert added.std() == pytest.approx(float(size), rel=0.1)
    assert abs(added.mean()) < 4 * size / added.numel() ** 0.5
    assert (noisy_bias - exact_bias).std() == pytest.approx(
        0.02 * float(bias1.square().mean().sqrt()), rel=0.6
    )
    correlation = torch.corrcoef(added.flatten(1))
    assert (correlation - torch.eye(8)).abs().max() < 0.5, "each expert has noise of its own"


def test_shared_expert_router_and_the_rest_are_as_described(parent, tmp_path):
    job = convert_job(tmp_path, upcycle_recipe(), parent=parent)
    assert run(job) == 0
    names = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")
    dense = read(parent, *names)
    shared = read(payload(job), *(f"shared_experts.{name}" for name in names))
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(shared, dense, strict=True))
    weight, bias, steering = read(payload(job), "router.weight", "router.bias", "router.expert_bias")
    assert weight.std() == pytest.approx(1e-3, rel=0.2)
    assert not bias.any()
    assert not steering.any()
    with WeightsReader(parent) as before, WeightsReader(payload(job)) as after:
        for name in before.names:
            if ".mlp." not in name or name.startswith("decoder.layers.0."):
                assert after.digest(name) == before.digest(name), name
    rows = summary(job)["layers"]
    assert [row["ffn"] for row in rows] == ["dense", "experts", "experts", "experts"]
    assert rows[0]["router_entropy"] is None
    assert 0 < rows[1]["router_entropy"] <= 2.0794416


@pytest.mark.parametrize(
    ("gain", "moe", "total"),
    [
        (0.25, {}, 2.5),
        (1.0, {}, 2.5),
        (0.5, {"topk": 1, "router_num_groups": None, "router_group_topk": None}, 1.25),
    ],
)
def test_at_any_gain_an_evenly_used_layer_is_the_dense_one(gain, moe, total, parent, tmp_path):
    """Each expert equally likely, a token's K experts together weighing ``total``: the mean is the parent."""
    target: Architecture = routed(**moe)
    job = convert_job(tmp_path, upcycle_recipe(target, expert_noise=0.0, routed_gain=gain), parent=parent)
    assert run(job) == 0
    z = torch.randn(50, 32, generator=torch.Generator().manual_seed(0))

    def ffn(fc1, bias1, fc2, bias2):
        return nn.functional.linear(squared_relu(nn.functional.linear(z, fc1, bias1)), fc2, bias2)

    names = ("linear_fc1.weight", "linear_fc1.bias", "linear_fc2.weight", "linear_fc2.bias")
    dense = ffn(*read(parent, *names))
    output = ffn(*read(payload(job), *(f"shared_experts.{name}" for name in names)))
    experts = read(payload(job), *(f"experts.{name}" for name in ("weight1", "bias1", "weight2", "bias2")))
    for expert in range(8):
        output = output + total / 8 * ffn(*(part[expert] for part in experts))
    torch.testing.assert_close(output, dense, rtol=1e-4, atol=1e-4)
    assert "logits_bit_identical" not in summary(job)["checks"]
    assert summary(job)["checks"]["logits_finite"]["passed"]


def test_a_narrower_first_layer_keeps_the_largest_neurons_when_asked(parent, tmp_path, capsys):
    target = routed(first=5)
    refused = convert_job(tmp_path, upcycle_recipe(target), "refused", parent=parent)
    assert run(refused) == 1
    assert "surgery.layer1 = 'shrink'" in capsys.readouterr().err
    job = convert_job(tmp_path, upcycle_recipe(target, layer1="shrink"), parent=parent)
    assert run(job) == 0
    with WeightsReader(parent) as before, WeightsReader(payload(job)) as after:
        name = "decoder.layers.0.mlp.linear_fc{}.{}".format
        kept = before.read(name(2, "weight")).numpy()
        kept = sorted((kept**2).sum(0).argsort()[-5:])
        assert torch.equal(after.read(name(1, "weight")), before.read(name(1, "weight"))[kept])
        assert torch.equal(after.read(name(1, "bias")), before.read(name(1, "bias"))[kept])
        assert torch.equal(after.read(name(2, "weight")), before.read(name(2, "weight"))[:, kept])
        assert torch.equal(after.read(name(2, "bias")), before.read(name(2, "bias")))
    assert summary(job)["transform"]["layer1_neurons"] == kept
    assert not summary(job)["checks"]["logits_bit_identical"]["passed"], "a cut layer is another function"


def test_the_seed_decides_the_bytes(parent, tmp_path):
    jobs = [convert_job(tmp_path, upcycle_recipe(), name, parent=parent) for name in "abc"]
    jobs[2] = jobs[2].model_copy(update={"seed": 4321})
    assert [run(job) for job in jobs] == [0, 0, 0]
    first, second, other = (files(payload(job)) for job in jobs)
    assert first == second
    assert first != other
