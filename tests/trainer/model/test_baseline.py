"""The baseline of the benchmarks computes what `reference` does, or its ratio would mean nothing."""

import torch

from benchmarks.baseline import built_as_baseline
from tests.trainer.model.model_cases import randomize, rows, tiny
from trainer.contract.schema.experiment import load_experiment
from trainer.model.gpt import build_model
from trainer.optim.optimizer import Optimizer


def stepped() -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Hidden states of packed rows, and the weights after one step by their gradients."""
    model = randomize(build_model(tiny("moe")))
    tokens, positions, documents = rows([[7, 1, 20], [9]], width=30)
    settings = load_experiment("smoke").training.optimizer
    optimizer = Optimizer(model, settings, clip_grad=1.0)
    optimizer.zero_grad()
    hidden = model.forward_hidden(tokens, positions, documents)
    real = (documents >= 0).t().unsqueeze(-1)
    ((hidden * real).square().mean() + model.pop_aux_loss() + 0 * model.head_weight.sum()).backward()
    optimizer.step(1.0)
    return (hidden * real).detach(), {name: p.detach().clone() for name, p in model.named_parameters()}


def test_it_has_the_references_hidden_states_and_weights_after_a_step():
    expected, weights = stepped()
    with built_as_baseline():
        found, its_weights = stepped()
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(its_weights[name], weight, atol=2e-4, rtol=2e-3, msg=name)


def test_afterwards_models_are_the_references_again():
    before = type(build_model(tiny("moe")).decoder.layers[0].self_attention.core_attention)
    with built_as_baseline():
        inside = type(build_model(tiny("moe")).decoder.layers[0].self_attention.core_attention)
    assert before is type(build_model(tiny("moe")).decoder.layers[0].self_attention.core_attention)
    assert inside is not before
