import pytest
import torch

from trainer.model import fused_routing, router


@pytest.mark.parametrize(
    ("score_function", "groups", "group_topk", "topk"),
    [
        ("sigmoid", 8, 4, 4),
        ("sigmoid", 8, 4, 8),
        ("sigmoid", None, None, 4),
        ("softmax", 4, 2, 4),
        ("sigmoid", 2, 1, 1),
    ],
)
@pytest.mark.parametrize("balance", [True, False])
def test_choice_weights_balance_and_gradients_are_the_references(
    score_function, groups, group_topk, topk, balance
):
    rules = router.RoutingRules(topk, score_function, groups, group_topk, 2.5)
    generator = torch.Generator().manual_seed(topk)
    given = torch.randn(20, 3, 32, generator=generator)
    valid = torch.rand(20, 3, generator=generator) > 0.2
    bias = torch.randn(32, generator=generator) * 0.1 if score_function == "sigmoid" else None
    direction = torch.randn(*valid.shape, topk, generator=generator)
    results = []
    for module in (router, fused_routing):
        logits = given.clone().requires_grad_()
        found = module.route_and_balance(logits, valid, bias, rules, balance=balance)
        aux = found.aux_loss if balance else torch.zeros(())
        ((found.weights * direction).sum() + aux).backward()
        results.append((found, logits.grad))
    (expected, to_expected), (found, to_found) = results
    assert torch.equal(found.chosen, expected.chosen)
    torch.testing.assert_close(found.weights, expected.weights)
    torch.testing.assert_close(to_found, to_expected)
    if balance:
        assert torch.equal(found.counts, expected.counts)
        torch.testing.assert_close(found.aux_loss, expected.aux_loss)
    else:
        assert (found.counts, found.aux_loss) == (None, None)
