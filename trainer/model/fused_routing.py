"""The router's choice, weights and balance as the reference's, of sums and maxima only, for the compiler.

The reference asks for three `topk` and two scatters, each a library kernel and some of them a sort. The few
best of a row are found here by taking the maximum away a few times, and places are told by comparing with
them, so that all of it is one pass over rows of E numbers. Where two scores are equal to the last bit the
lower number wins, which `torch.topk` leaves open.
"""

import torch
from torch import Tensor

from trainer.model.fusing import fused, unfused
from trainer.model.router import Routing, RoutingRules


def route_and_balance(
    logits: Tensor, valid: Tensor, expert_bias: Tensor | None, rules: RoutingRules, *, balance: bool
) -> Routing:
    """Route; see `trainer.model.router.route_and_balance`."""
    run = fused if balance and logits.is_cuda else unfused  # training passes alone have one shape
    found = run(_routed)(
        logits,
        valid,
        expert_bias,
        rules.topk,
        rules.score_function,
        rules.num_groups,
        rules.group_topk,
        rules.scaling_factor,
        balance,
    )
    return Routing(*found)


def _routed(
    logits: Tensor,
    valid: Tensor,
    expert_bias: Tensor | None,
    topk: int,
    score_function: str,
    num_groups: int | None,
    group_topk: int | None,
    scaling_factor: float,
    balance: bool,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    experts = logits.shape[-1]
    if score_function == "sigmoid":
        scores = logits.sigmoid()
        selection = scores.detach() if expert_bias is None else scores.detach() + expert_bias
    else:
        scores = logits.softmax(dim=-1)
        selection = logits.detach()
    if num_groups and group_topk:
        selection = _open_groups(selection, topk, num_groups, group_topk)
    chosen, _ = _best(selection, topk)
    numbers = torch.arange(experts, device=logits.device)
    picked = chosen.unsqueeze(-1) == numbers  # [S, B, K, E]
    source = scores if score_function == "sigmoid" else logits
    weights = torch.where(picked, source.unsqueeze(-2), 0.0).sum(dim=-1)
    if score_function == "softmax":
        weights = weights.softmax(dim=-1)
    elif topk > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    weights = torch.where(valid.unsqueeze(-1), weights * scaling_factor, 0.0).float()
    chosen = torch.where(valid.unsqueeze(-1), chosen, experts)
    counts = aux = None
    if balance:
        counts = (picked & valid[..., None, None]).sum(dim=(0, 1, 2))
        share = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
        _, marked = _best(share.detach(), topk)
        mass = torch.where(valid.unsqueeze(-1), share, 0.0).sum(dim=0)  # [B, E]
        load = (marked & valid.unsqueeze(-1)).sum(dim=0).to(share.dtype)
        tokens = valid.sum(dim=0).clamp(min=1).to(share.dtype)
        aux = (experts / (topk * tokens.square()) * (mass * load).sum(dim=-1)).mean()
    return weights, chosen, aux, counts


def _open_groups(selection: Tensor, topk: int, num_groups: int, group_topk: int) -> Tensor:
    """Close the experts of all but the best groups; see `trainer.model.router.select_experts`."""
    grouped = selection.unflatten(-1, (num_groups, -1))
    score, left = torch.zeros_like(grouped[..., 0]), grouped
    for _ in range(topk // group_topk):
        best = left.amax(dim=-1, keepdim=True)
        place = left.argmax(dim=-1, keepdim=True)
        score = score + best.squeeze(-1)
        left = left.masked_fill(torch.arange(left.shape[-1], device=left.device) == place, float("-inf"))
    _, opened = _best(score, group_topk)
    return grouped.masked_fill(~opened.unsqueeze(-1), float("-inf")).flatten(-2)


def _best(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Places of the largest values of each row, largest first, int64 `[…, count]`; and a mark on them."""
    numbers = torch.arange(values.shape[-1], device=values.device)
    places, marked = [], torch.zeros_like(values, dtype=torch.bool)
    for _ in range(count):
        place = values.masked_fill(marked, float("-inf")).argmax(dim=-1, keepdim=True)
        places.append(place)
        marked = marked | (numbers == place)
    return torch.cat(places, dim=-1), marked
