"""Two ranks compute what one computes: weights, logits, gradients, counts and checkpoint layout."""

import pytest
import torch

from tests.ranks import run_ranks
from tests.trainer.model.two_ranks import (
    CASES,
    batch,
    findings,
    loss_weights,
    odd_batch,
    reference_weights,
    run,
)
from trainer.model.gpt import build_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def session():
    """Findings of both ranks, by case."""
    return run_ranks(2, findings)[0]


@pytest.fixture(scope="module")
def alone():
    """The same on one rank; made once for each architecture."""
    cache = {}

    def of(arch):
        key = arch.model_dump_json()
        if key not in cache:
            model = build_model(arch)
            initial = {name: p.detach().clone() for name, p in model.named_parameters()}
            model.load_state_dict(model.state_dict() | reference_weights(arch))
            logits = run(model, batch(), loss_weights(), 1.0)
            gradients = {name: p.grad for name, p in model.named_parameters()}
            counts = model.router_counts() if model.moe_layers else None
            cache[key] = (initial, logits, gradients, counts, model)
        return cache[key]

    return of


@pytest.mark.parametrize("name", CASES)
def test_every_layout_starts_from_the_same_weights(session, alone, name):
    initial = alone(CASES[name]["arch"])[0]
    for found in session[name]:
        assert found["initial"].keys() == initial.keys()
        for parameter, expected in initial.items():
            assert torch.equal(found["initial"][parameter], expected), parameter


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_those_of_one_rank(session, alone, name):
    logits = alone(CASES[name]["arch"])[1]
    assert logits.abs().max() > 0.5
    for found in session[name]:
        torch.testing.assert_close(found["logits"], logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "tp" in name])
def test_tokens_that_ranks_cannot_share_evenly(session, alone, name):
    model = alone(CASES[name]["arch"])[4].eval()
    expected = model(*odd_batch())
    model.train()
    for found in session[name]:
        torch.testing.assert_close(found["odd logits"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if "tp" in name])
def test_decoding_with_a_cache_gives_every_rank_the_logits_of_one_rank(session, alone, name):
    model = alone(CASES[name]["arch"])[4].eval()
    tokens = batch()[0]
    with torch.no_grad():
        # Rows of the batch hold two documents, and one with padding; decoding sees one without a break.
        first, second = (
            model(tokens[row : row + 1, :8], torch.arange(8)[None], torch.zeros(1, 8, dtype=torch.int64))[0]
            for row in range(2)
        )
    model.train()
    expected = torch.stack((first[4:8], second[1:5]))
    for found in session[name]:
        torch.testing.assert_close(found["decoded"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_gradients_equal_those_of_one_rank_on_every_rank(session, alone, name):
    """With the sum over the data-parallel (for experts: expert data-parallel) group and nothing else."""
    gradients = alone(CASES[name]["arch"])[2]
    for found in session[name]:
        for parameter, expected in gradients.items():
            scale = expected.abs().max().item()
            assert scale > 0.0, parameter
            torch.testing.assert_close(
                found["gradients"][parameter], expected, rtol=1e-3, atol=1e-4 * scale, msg=parameter
            )


@pytest.mark.parametrize("name", [name for name in CASES if "moe" in name])
def test_router_counts_equal_those_of_one_rank(session, alone, name):
    counts = alone(CASES[name]["arch"])[3]
    assert counts.sum(dim=1).tolist() == [2 * 19] * 3
    for found in session[name]:
        assert torch.equal(found["counts"], counts)


@pytest.mark.parametrize("name", CASES)
def test_checkpoint_shards_tile_the_whole_tensors(session, alone, name):
    """Main replicas cover each tensor exactly once, in the shape of the whole model's."""
    shapes = {
        key: tuple(t.shape) for key, t in alone(CASES[name]["arch"])[4].state_dict().items() if t is not None
    }
    first, second = (found["sharded"] for found in session[name])
    assert first.keys() == second.keys() == shapes.keys()
    for key, shape in shapes.items():
        covered = set()
        for whole, offset, local, replica in (first[key], second[key]):
            assert whole == shape, key
            if any(replica):
                continue
            cells = {tuple(o + i for o, i in zip(offset, index, strict=True)) for index in _corners(local)}
            assert not cells & covered, key
            covered |= cells
        held = [
            (offset, local) for _, offset, local, replica in (first[key], second[key]) if not any(replica)
        ]
        elements = sum(torch.Size(local).numel() for _, local in held)
        assert elements == torch.Size(shape).numel(), key


def _corners(shape):
    return {tuple(0 for _ in shape), tuple(size - 1 for size in shape)}


def test_tensor_product_factors_and_experts_are_split_and_the_rest_replicated(session):
    shards = session["dense, tp 2"][1]["sharded"]
    attention = "decoder.layers.0.self_attention."
    for factor in ("a_q", "a_k", "a_v", "bias"):
        _whole, offset, local, _ = shards[f"{attention}linear_tpa.{factor}"]
        assert offset[0] == local[0], factor
    for factor in ("b_q", "b_k", "b_v"):
        whole, offset, local, replica = shards[f"{attention}linear_tpa.{factor}"]
        assert (local, set(offset)) == (whole, {0})
        assert any(replica)
    assert shards[f"{attention}core_attention.softmax_offset"][1] == (2,)
    whole, offset, local, _ = session["moe, ep 2"][1]["sharded"]["decoder.layers.1.mlp.experts.weight1"]
    assert (whole, offset, local) == ((8, 6, 32), (4, 0, 0), (4, 6, 32))


def test_layouts_that_cannot_work_are_refused(session):
    refusals = session["refusals"]
    assert (
        "torch.distributed runs 2 ranks, but their tensor- and expert-parallel groups"
        in refusals["no groups"]
    )
    assert "expert_tensor_parallel_size = 2" in refusals["expert tensor parallel"]
