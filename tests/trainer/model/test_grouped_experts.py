"""Experts by grouped products against the reference's loop over experts."""

import dataclasses

import pytest
import torch

from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.contract.schema.base import ConfigError
from trainer.model import gpt, grouped_experts
from trainer.model.gpt import build_model

WIDTH = {"ffn_hidden_size": 8}


@pytest.fixture
def grouped(monkeypatch):
    """Let models be built with grouped experts in the reference's backend."""
    load = gpt.load_backend

    def built(**tables):
        reference = randomize(build_model(tiny("moe", **tables)))
        with monkeypatch.context() as patched:
            patched.setattr(
                gpt,
                "load_backend",
                lambda word: dataclasses.replace(load(word), experts=grouped_experts.GroupedExperts),
            )
            model = build_model(tiny("moe", **tables))
        model.load_state_dict(reference.state_dict())
        assert type(model.moe_layers[0].experts) is grouped_experts.GroupedExperts
        return reference, model

    return built


@pytest.mark.parametrize("biased", [True, False])
def test_outputs_and_every_gradient_are_the_references(grouped, biased):
    reference, model = grouped(model=WIDTH | {"add_bias_linear": biased})
    batch = rows([[7, 5], [9]], width=14)
    real = batch[2] >= 0
    for each in (reference, model):
        (each(*batch)[real].square().mean() + each.pop_aux_loss()).backward()
    torch.testing.assert_close(model(*batch)[real], reference(*batch)[real], rtol=1e-5, atol=1e-6)
    for (name, expected), (_, found) in zip(
        reference.named_parameters(), model.named_parameters(), strict=True
    ):
        torch.testing.assert_close(found.grad, expected.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_what_a_product_leaves_in_rows_of_nobody_reaches_nothing(grouped, monkeypatch):
    _, model = grouped(model=WIDTH)
    product = grouped_experts.grouped_mm

    def poisoned(left, right, *, offs):
        out = product(left, right, offs=offs)
        if left.dim() == 2 and right.dim() == 3:
            out[int(offs[-1]) :] = float("nan")
        return out

    batch = rows([[3], [4, 2]], width=12)
    clean = model(*batch)
    monkeypatch.setattr(grouped_experts, "grouped_mm", poisoned)
    found = model(*batch)
    assert torch.equal(found, clean)
    (found.square().mean() + model.pop_aux_loss()).backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)


def test_a_batch_of_padding_alone_gives_every_expert_a_gradient_of_zero(grouped):
    _, model = grouped(model=WIDTH)
    layer = model.moe_layers[0]
    hidden = torch.randn(6, 1, model.config.hidden_size, requires_grad=True)
    out, _ = layer(hidden, torch.ones(1, 6, dtype=torch.bool))
    out.sum().backward()
    assert not any(parameter.grad.any() for parameter in layer.experts.parameters())


def test_a_width_that_cannot_be_aligned_is_refused_with_the_remedy(grouped):
    with pytest.raises(ConfigError, match=r"model\.ffn_hidden_size = 6: .* multiples of 4 .*'reference'"):
        grouped(model={"ffn_hidden_size": 6})
