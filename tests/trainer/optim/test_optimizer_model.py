"""The optimizer on the real model: routing at full size, and a small one trained, stored and resumed."""

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.validation import StrictHandling

from tests.trainer.optim.optim_models import count_matrices, on_ranks, settings, weights
from trainer.checkpoints.resume import TorchDistSave
from trainer.contract.schema.experiment import load_experiment
from trainer.model.gpt import build_model
from trainer.optim.optimizer import Optimizer
from trainer.optim.routing import route_model


@pytest.fixture(scope="module")
def full_size():
    model = build_model(load_experiment("full").architecture("vpmoe"), dtype=torch.bfloat16, device="meta")
    return route_model(model.named_parameters(), load_experiment("full").training.optimizer)


def test_the_full_model_routes_41147_matrices(full_size):
    assert count_matrices(full_size) == 41_147
    assert count_matrices(entry for entry in full_size if ".mlp.experts." in entry.name) == 40_448


@pytest.mark.parametrize(
    ("ending", "algorithm", "decays"),
    [
        ("embedding.word_embeddings.weight", "adamw", False),
        ("output_layer.weight", "adamw", False),
        ("self_attention.linear_qkv.weight", "normuon", True),
        ("self_attention.linear_proj.weight", "normuon", True),
        ("self_attention.linear_proj.bias", "adamw", False),
        ("linear_tpa.a_q", "normuon", True),
        ("linear_tpa.b_v", "normuon", True),
        ("linear_tpa.bias", "adamw", False),
        ("mlp.experts.weight1", "normuon", True),
        ("mlp.experts.weight2", "normuon", True),
        ("mlp.experts.bias1", "adamw", False),
        ("mlp.experts.bias2", "adamw", False),
        ("mlp.router.weight", "normuon", True),
        ("mlp.router.bias", "adamw", False),
        ("mlp.shared_experts.linear_fc1.weight", "normuon", True),
        ("q_layernorm.weight", "adamw", False),
        ("softmax_offset", "adamw", False),
        ("value_residual_logit", "adamw", False),
        ("log_freq", "adamw", False),
    ],
)
def test_each_kind_of_parameter_goes_where_it_belongs(full_size, ending, algorithm, decays):
    routes = {entry.route for entry in full_size if entry.name.endswith(ending)}
    assert routes, f"no parameter ends with {ending}"
    assert {route.algorithm for route in routes} == {algorithm}
    assert {route.weight_decay > 0 for route in routes} == {decays}


def train(model, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 1000, (1, 24), generator=generator)
        optimizer.zero_grad()
        hidden = model.forward_hidden(tokens, torch.arange(24)[None], torch.zeros(1, 24, dtype=torch.int64))
        logits = hidden[:-1, 0] @ model.head_weight[:1000].T
        loss = torch.nn.functional.cross_entropy(logits.float(), tokens[0, 1:]) + model.pop_aux_loss()
        loss.backward()
        yield loss.item(), optimizer.step(1.0)


def places(model):
    return model.sharded_state_dict()


def test_the_smoke_model_in_bfloat16_resumes_bit_for_bit_through_a_checkpoint(tmp_path):
    dtype = torch.bfloat16
    arch = load_experiment("smoke").architecture("vpmoe")
    model = build_model(arch, dtype=dtype, seed=1)
    optimizer = Optimizer(model, settings(lr=2e-3), clip_grad=1.0)
    for _ in train(model, optimizer, range(2)):  # each step would refuse a parameter without a gradient
        pass
    where = places(model)
    state = {"model": where, "optimizer": optimizer.sharded_state_dict(where)}
    dist_checkpointing.save(state, str(tmp_path), sharded_strategy=TorchDistSave("torch_dist", 1))
    straight = list(train(model, optimizer, range(2, 4)))
    final = weights(model)
    optimizer.close()
    del optimizer

    resumed = build_model(arch, dtype=dtype, seed=2)
    again = Optimizer(resumed, settings(lr=2e-3), clip_grad=1.0)
    where = places(resumed)
    state = {"model": where, "optimizer": again.sharded_state_dict(where)}
    loaded = dist_checkpointing.load(state, str(tmp_path), strict=StrictHandling.RAISE_ALL)
    resumed.load_state_dict(loaded["model"])
    again.load_state_dict(loaded["optimizer"])
    assert list(train(resumed, again, range(2, 4))) == straight
    assert all(torch.equal(weight, final[name]) for name, weight in weights(resumed).items())


def norms_of_two_steps(rank=None):
    """Gradient norms of two steps; the second one's depends on every weight the first one changed."""
    model = build_model(load_experiment("smoke").architecture("vpmoe"), seed=1)
    model.head_weight.requires_grad_(False)  # the loss below is one of hidden states
    optimizer = Optimizer(model, settings(lr=2e-3), clip_grad=1.0)
    share = 1.0 if rank is None else 1.0 / rank.topology.data.size
    norms = []
    for step in range(2):
        generator = torch.Generator().manual_seed(step)
        tokens = torch.randint(0, 1000, (1, 32), generator=generator)
        target = torch.randn(32, 1, 64, generator=generator)
        optimizer.zero_grad()
        hidden = model.forward_hidden(tokens, torch.arange(32)[None], torch.zeros(1, 32, dtype=torch.int64))
        loss = (hidden.float() - target).square().mean() + model.pop_aux_loss()
        (loss * share).backward()  # every data-parallel rank sees the same sample
        norms.append(optimizer.step(1.0).grad_norm)
    return norms


@pytest.mark.slow
@pytest.mark.parametrize("layout", [{}, {"tp": 2}, {"ep": 2}], ids=["dp2", "tp2", "ep2"])
def test_the_smoke_model_takes_the_same_steps_in_every_layout(layout, tmp_path):
    alone = on_ranks(tmp_path / "alone", norms_of_two_steps, world=1)[0]
    for norms in on_ranks(tmp_path / "ranks", norms_of_two_steps, world=2, **layout):
        assert norms == pytest.approx(alone, rel=1e-4)
