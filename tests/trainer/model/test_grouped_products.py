"""The experts' kernels, in Triton's interpreter, against the products of torch that run on a CPU."""

import pytest
import torch

from tests.trainer.interpreted import runtime_bounds  # noqa: F401 - a fixture of every test here
from trainer.model import grouped_experts
from trainer.model.grouped_experts import _GroupedFFN
from trainer.model.grouped_products import KernelFFN
from trainer.model.pair_sort import sort_pairs
from trainer.model.parameters import is_written, take_written

EXPERTS, HIDDEN = 5, 144


def layer(width, *, biased, seed=0):
    made = torch.Generator().manual_seed(seed)

    def parameter(*shape):
        return torch.nn.Parameter(torch.randn(*shape, generator=made) / 4)

    bias1, bias2 = (parameter(EXPERTS, width), parameter(EXPERTS, HIDDEN)) if biased else (None, None)
    return parameter(EXPERTS, width, HIDDEN), bias1, parameter(EXPERTS, HIDDEN, width), bias2


def inputs(tokens, topk, *, seed=0, idle=()):
    made = torch.Generator().manual_seed(seed)
    hidden = torch.randn(tokens, HIDDEN, generator=made, requires_grad=True)
    weights = torch.rand(tokens, topk, generator=made, requires_grad=True)
    places = torch.tensor([e for e in range(EXPERTS) if e not in idle])
    chosen = torch.stack([places[torch.randperm(len(places), generator=made)[:topk]] for _ in range(tokens)])
    chosen[tokens // 3] = EXPERTS  # padding
    return hidden, weights, chosen


def run(function, hidden, weights, chosen, held):
    pairs = sort_pairs(chosen.reshape(-1), EXPERTS)
    return function(hidden, weights, pairs, *held)


def by_kernels(hidden, weights, pairs, *held):
    return KernelFFN.apply(grouped_experts.combine, grouped_experts.gather, hidden, weights, pairs, *held)


@pytest.mark.parametrize("width", [16, 144])
@pytest.mark.parametrize("biased", [True, False])
def test_outputs_and_every_gradient_are_those_of_products_by_torch(width, biased):
    held = layer(width, biased=biased)
    found = []
    for function in (_GroupedFFN.apply, by_kernels):
        hidden, weights, chosen = inputs(37, 2, idle=(3,))
        out = run(function, hidden, weights, chosen, held)
        (out * torch.linspace(-1, 1, out.numel()).view_as(out)).sum().backward()
        leaves = [hidden, weights, *(p for p in held if p is not None)]
        found.append([out.detach(), *(leaf.grad for leaf in leaves)])
        for leaf in leaves:
            leaf.grad = None
    for expected, seen in zip(*found, strict=True):
        torch.testing.assert_close(seen, expected, rtol=1e-4, atol=1e-4)


def test_gradients_of_experts_go_to_main_grad_where_there_is_one():
    held = layer(16, biased=True)
    for parameter in held:
        parameter.main_grad = torch.full_like(parameter, float("nan"))
    totals = [torch.zeros_like(parameter) for parameter in held]
    for seed in range(2):  # the first micro-batch replaces what stands there, the second adds to it
        batch = inputs(20, 2, seed=seed, idle=(0,))
        run(by_kernels, *batch, held).sum().backward()
        assert all(is_written(parameter) and parameter.grad is None for parameter in held)
        again = [torch.nn.Parameter(parameter.detach()) for parameter in held]
        run(_GroupedFFN.apply, *inputs(20, 2, seed=seed, idle=(0,)), again).sum().backward()
        for total, parameter in zip(totals, again, strict=True):
            total += parameter.grad
        for total, parameter in zip(totals, held, strict=True):
            torch.testing.assert_close(parameter.main_grad, total, rtol=1e-4, atol=1e-4)
    assert all(take_written(parameter) for parameter in held)


def test_frozen_experts_get_no_gradient_and_keep_what_they_had():
    held = layer(16, biased=True)
    for parameter in held:
        parameter.main_grad = torch.full_like(parameter, 3.0)
        parameter.requires_grad_(False)
    hidden, weights, chosen = inputs(20, 2)
    run(by_kernels, hidden, weights, chosen, held).sum().backward()
    assert hidden.grad is not None
    assert all((parameter.main_grad == 3.0).all() and not is_written(parameter) for parameter in held)


def test_tokens_of_nobody_get_nothing_and_give_nothing():
    held = layer(16, biased=True)
    hidden, weights, _ = inputs(6, 2)
    out = run(by_kernels, hidden, weights, torch.full((6, 2), EXPERTS), held)
    out.sum().backward()
    assert not out.any()
    assert not hidden.grad.any()
    assert not weights.grad.any()
    assert not any(parameter.grad.any() for parameter in held)
