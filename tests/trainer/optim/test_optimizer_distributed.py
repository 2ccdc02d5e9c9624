"""Two gloo ranks against one process: data, tensor and expert parallel; checkpoints that change layout."""

import itertools

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from tests.trainer.optim.optim_models import (
    SPECS,
    PrescribedGradients,
    on_ranks,
    settings,
    state_bytes,
    train,
    weights,
)
from trainer.checkpoints.resume import TorchDistSave
from trainer.errors import MissingGradientError, NonFiniteGradientError
from trainer.optim.optimizer import Optimizer
from trainer.optim.parts import Part

FLOAT, BFLOAT = torch.float32, torch.bfloat16


@pytest.fixture(autouse=True)
def split_small_tables(monkeypatch):
    """Tables of the test model are split by rows like those of a real vocabulary."""
    monkeypatch.setattr("trainer.contract.partition.elementwise_unit.__defaults__", (200,))


def build(rank, dtype=FLOAT, shard=True, **changes):
    import trainer.contract.partition as partition

    partition.elementwise_unit.__defaults__ = (200,)  # the same in every rank's process
    model = PrescribedGradients(rank.topology, rank.ep, dtype)
    return model, Optimizer(model, settings(**changes), clip_grad=1.0, shard=shard)


def save(rank, name, model, optimizer):
    path = rank.directory / name
    path.mkdir(exist_ok=True)
    places = model.sharded_state_dict()
    state = {"model": dict(places), "optimizer": optimizer.sharded_state_dict(places)}
    dist_checkpointing.save(state, str(path), sharded_strategy=TorchDistSave("torch_dist", 1))
    return str(path)


def load(path, model, optimizer):
    places = model.sharded_state_dict()
    state = {"model": dict(places), "optimizer": optimizer.sharded_state_dict(places)}
    state = dist_checkpointing.load(state, path, strict=StrictHandling.RAISE_ALL)
    model.load_state_dict(state["model"])
    optimizer.load_state_dict(state["optimizer"])


def owned(optimizer: Optimizer) -> dict[str, tuple[int, int]]:
    def rows(part: Part) -> tuple[int, int]:
        return part.start, part.start + (part.weight.size(0) if part.weight.ndim else 1)

    return {part.name: rows(part) for part in optimizer._parts}


def single(dtype=FLOAT, steps=4):
    model = PrescribedGradients(dtype=dtype)
    stats = train(model, Optimizer(model, settings(), clip_grad=1.0), range(steps))
    return weights(model), [s.grad_norm for s in stats]


def assembled(ranks, dim_of):
    """Whole weights from each rank's own."""
    return {
        name: ranks[0][name] if dim_of(spec) is None else torch.cat([r[name] for r in ranks], dim_of(spec))
        for name, spec in SPECS.items()
    }


# ---------------------------------------------------------------- what the ranks do


def train_data_parallel(rank):
    results = {}
    for dtype in (FLOAT, BFLOAT):
        for shard in (True, False):
            model, optimizer = build(rank, dtype, shard)
            stats = train(model, optimizer, range(4))
            results[dtype, shard] = (weights(model), [s.grad_norm for s in stats], owned(optimizer))
            results[dtype, shard, "bytes"] = state_bytes(optimizer)
    model, optimizer = build(rank, BFLOAT)
    train(model, optimizer, range(2))
    results["checkpoint"] = save(rank, "two_ranks", model, optimizer)
    train(model, optimizer, range(2, 4))
    results["continued"] = weights(model)
    fresh, resumed = build(rank, BFLOAT)
    load(results["checkpoint"], fresh, resumed)
    train(fresh, resumed, range(2, 4))
    results["resumed"] = weights(fresh)
    results["reached_on_one_rank"] = reached_on_one_rank(rank)
    results["missing"] = missing_on_every_rank(rank)
    results["error"] = poison_one_rank(rank)
    return results


def reached_on_one_rank(rank):
    """A parameter that only one rank's batch reached has its gradient on all."""
    model, optimizer = build(rank)
    optimizer.zero_grad()
    model.backward(0, skip=("router",) if rank.rank == 0 else ())
    optimizer.step(1.0)
    return weights(model)


def missing_on_every_rank(rank):
    model, optimizer = build(rank)
    optimizer.zero_grad()
    model.backward(0, skip=("router", "tpa") if rank.rank == 0 else ("tpa",))
    before = weights(model)
    with pytest.raises(MissingGradientError) as caught:
        optimizer.step(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    return str(caught.value)


def missing_experts_of_one_rank(rank):
    """Each expert-parallel rank has experts of its own: one rank's gradient says nothing of the other's."""
    model, optimizer = build(rank)
    optimizer.zero_grad()
    model.backward(0, skip=("weight1",) if rank.rank == 1 else ())
    with pytest.raises(MissingGradientError) as caught:
        optimizer.step(1.0)
    return str(caught.value)


def poison_one_rank(rank):
    model, optimizer = build(rank)
    optimizer.zero_grad()
    model.backward(0)
    if rank.rank == 1:
        model.weight1.main_grad[2, 1, 1] = float("nan")
    before = weights(model)
    with pytest.raises(NonFiniteGradientError) as caught:
        optimizer.step(1.0)
    assert all(torch.equal(weight, before[name]) for name, weight in weights(model).items())
    return str(caught.value)


def load_alone(rank, two_rank_checkpoint):
    """One rank reads what two wrote, goes on, and writes its own."""
    model, optimizer = build(rank, BFLOAT)
    load(two_rank_checkpoint, model, optimizer)
    state = {
        name: t.data.clone()
        for name, t in optimizer.sharded_state_dict(model.sharded_state_dict())["tensors"].items()
    }
    again = save(rank, "one_rank", model, optimizer)
    train(model, optimizer, range(2, 4))
    own, reference = build(rank, BFLOAT)
    train(own, reference, range(2))
    expected = {
        name: t.data for name, t in reference.sharded_state_dict(own.sharded_state_dict())["tensors"].items()
    }
    return {
        "state": state,
        "expected": expected,
        "weights": weights(model),
        "checkpoint": again,
        "steps": optimizer.steps,
    }


def load_on_two(rank, checkpoint):
    model, optimizer = build(rank, BFLOAT)
    load(checkpoint, model, optimizer)
    train(model, optimizer, range(2, 4))
    return weights(model)


def train_split(rank, steps=4):
    """Tensor or expert parallel, with a resume in the middle."""
    model, optimizer = build(rank)
    stats = train(model, optimizer, range(2))
    path = save(rank, "split", model, optimizer)
    stats += train(model, optimizer, range(2, steps))
    fresh, resumed = build(rank)
    load(path, fresh, resumed)
    train(fresh, resumed, range(2, steps))
    assert all(torch.equal(weight, weights(model)[name]) for name, weight in weights(fresh).items())
    return weights(model), [s.grad_norm for s in stats], owned(optimizer)


def train_partial_gradients(rank):
    """Both tensor-parallel ranks hold `tpa` whole but each sees half of its gradient."""
    model, _ = PrescribedGradients(rank.topology, rank.ep), None
    model.tpa.tp_grad_sum = True
    optimizer = Optimizer(model, settings(), clip_grad=1.0)
    optimizer.zero_grad()
    model.backward(0)
    model.tpa.main_grad.mul_(0.25 if rank.rank == 0 else 0.75)
    norm = optimizer.step(1.0).grad_norm
    return weights(model), norm


# ---------------------------------------------------------------- what must come out


@pytest.fixture(scope="module")
def data_parallel(tmp_path_factory):
    return on_ranks(tmp_path_factory.mktemp("dp") / "ranks", train_data_parallel, world=2)


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=["fp32", "bf16"])
def test_two_data_parallel_ranks_train_like_one_process(data_parallel, dtype):
    reference, norms = single(dtype)
    for rank in data_parallel:
        for shard in (True, False):
            trained, their_norms, _ = rank[dtype, shard]
            assert their_norms == pytest.approx(norms, rel=1e-6)
            for name, weight in trained.items():
                torch.testing.assert_close(
                    weight, reference[name], rtol=1e-4 if dtype is FLOAT else 8e-3, atol=1e-5
                )


@pytest.mark.parametrize("dtype", [FLOAT, BFLOAT], ids=["fp32", "bf16"])
def test_sharded_equals_replicated_and_both_ranks_agree_bit_for_bit(data_parallel, dtype):
    sharded, replicated = data_parallel[0][dtype, True][0], data_parallel[0][dtype, False][0]
    for name, weight in sharded.items():
        torch.testing.assert_close(weight, replicated[name], rtol=1e-5, atol=1e-6)
        assert torch.equal(weight, data_parallel[1][dtype, True][0][name])
        assert torch.equal(replicated[name], data_parallel[1][dtype, False][0][name])


def test_each_row_belongs_to_one_rank_and_state_is_halved(data_parallel):
    first, second = (rank[FLOAT, True][2] for rank in data_parallel)
    assert first["weight1"] == (0, 2)
    assert second["weight1"] == (2, 4)
    assert (first["embedding"], second["embedding"]) == ((0, 25), (25, 50))
    for name, spec in SPECS.items():
        ranges = sorted(owner[name] for owner in (first, second) if name in owner)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == (spec.shape[0] if spec.shape else 1)
        assert all(left[1] == right[0] for left, right in itertools.pairwise(ranges))
    whole = data_parallel[0][BFLOAT, False, "bytes"]
    halves = [rank[BFLOAT, True, "bytes"] for rank in data_parallel]
    assert sum(halves) == whole
    assert max(halves) < 0.6 * whole


def test_resuming_on_the_same_ranks_is_bit_exact(data_parallel):
    for rank in data_parallel:
        assert all(torch.equal(rank["resumed"][name], weight) for name, weight in rank["continued"].items())


def test_a_checkpoint_of_two_ranks_resumes_on_one_and_back(data_parallel, tmp_path):
    alone = on_ranks(tmp_path / "one", load_alone, data_parallel[0]["checkpoint"], world=1)[0]
    assert alone["steps"] == 4
    assert alone["state"].keys() == alone["expected"].keys()
    for name, tensor in alone["state"].items():
        torch.testing.assert_close(tensor, alone["expected"][name], rtol=1e-4, atol=1e-6)
    for name, weight in alone["weights"].items():
        torch.testing.assert_close(weight, data_parallel[0]["continued"][name], rtol=8e-3, atol=1e-5)
    back = on_ranks(tmp_path / "two", load_on_two, alone["checkpoint"], world=2)
    for rank in back:  # state went through one rank and came back: the same bits as never having left
        assert all(torch.equal(rank[name], weight) for name, weight in data_parallel[0]["continued"].items())


def test_a_parameter_reached_on_one_rank_only_moves_on_both(data_parallel):
    first, second = (rank["reached_on_one_rank"] for rank in data_parallel)
    assert all(torch.equal(first[name], second[name]) for name in SPECS)
    start = weights(PrescribedGradients())
    assert not torch.equal(first["router"], start["router"])


def test_a_parameter_that_no_rank_reached_stops_both(data_parallel):
    for rank in data_parallel:
        assert rank["missing"].startswith(f"tpa: 1 of {len(SPECS)} parameters")


def test_experts_that_their_own_rank_did_not_reach_stop_both(tmp_path):
    for message in on_ranks(tmp_path / "ep", missing_experts_of_one_rank, world=2, ep=2):
        assert message.startswith("weight1: 1 of")


def test_a_nan_on_one_rank_stops_both_before_anything_changes(data_parallel):
    for rank in data_parallel:
        assert "gradient norm is nan at optimizer step 1" in rank["error"]
    assert "weight1" in data_parallel[0]["error"] + data_parallel[1]["error"]


def test_two_tensor_parallel_ranks_train_like_one_process(tmp_path):
    reference, norms = single()
    ranks = on_ranks(tmp_path / "tp", train_split, world=2, tp=2)
    whole = assembled([rank[0] for rank in ranks], lambda spec: spec.tensor_dim)
    assert ranks[0][1] == ranks[1][1] == pytest.approx(norms, rel=1e-6)
    for name, weight in whole.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-5, atol=1e-6)
        if SPECS[name].tensor_dim is None:
            assert torch.equal(ranks[0][0][name], ranks[1][0][name])


def test_partial_gradients_of_replicated_parameters_are_summed_over_tensor_ranks(tmp_path):
    reference, norms = single(steps=1)
    ranks = on_ranks(tmp_path / "tp", train_partial_gradients, world=2, tp=2)
    for trained, norm in ranks:
        assert norm == pytest.approx(norms[0], rel=1e-6)
        torch.testing.assert_close(trained["tpa"], reference["tpa"], rtol=1e-5, atol=1e-6)


def test_two_expert_parallel_ranks_train_like_one_process(tmp_path):
    reference, norms = single()
    ranks = on_ranks(tmp_path / "ep", train_split, world=2, ep=2)
    whole = assembled([rank[0] for rank in ranks], lambda spec: 0 if spec.expert else None)
    assert ranks[0][1] == ranks[1][1] == pytest.approx(norms, rel=1e-6)
    for name, weight in whole.items():
        torch.testing.assert_close(weight, reference[name], rtol=1e-4, atol=1e-5)
    assert [rank[2]["weight1"] for rank in ranks] == [(0, 2), (0, 2)]  # each its own two of four experts
