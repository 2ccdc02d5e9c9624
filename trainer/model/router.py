"""The router: which experts a token goes to, with which weight, and how their load is kept even."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.precision import Float32Parameters

_DTYPES = {"fp32": torch.float32, "fp64": torch.float64}


def select_experts(
    selection: torch.Tensor, topk: int, num_groups: int | None, group_topk: int | None
) -> torch.Tensor:
    """Return the indices of the chosen experts, int64 `[T, K]`.

    With groups (DeepSeek-V3's node-limited routing): the score of a group is the sum of its best `K //
    group_topk` experts; only experts of the best `group_topk` groups can be chosen. Ties are broken by
    `torch.topk`.

    Args:
        selection: `[T, E]`, selection scores (expert bias included).
        topk: K.
        num_groups: Equal groups of neighbouring experts, or None for no limit.
        group_topk: Groups a token may use.
    """
    if num_groups and group_topk:
        tokens, experts = selection.shape
        grouped = selection.view(tokens, num_groups, -1)
        group_score = grouped.topk(topk // group_topk, dim=-1).values.sum(dim=-1)
        best = group_score.topk(group_topk, dim=-1).indices
        open_groups = torch.zeros_like(group_score, dtype=torch.bool).scatter_(1, best, True)
        closed = ~open_groups[:, :, None].expand(-1, -1, experts // num_groups).reshape(tokens, experts)
        selection = selection.masked_fill(closed, float("-inf"))
    return selection.topk(topk, dim=-1).indices


def route(
    logits: torch.Tensor,
    *,
    topk: int,
    score_function: str = "sigmoid",
    expert_bias: torch.Tensor | None = None,
    num_groups: int | None = None,
    group_topk: int | None = None,
    scaling_factor: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Weights and indices of each token's experts.

    `sigmoid` (DeepSeek-V3): `s = σ(logits)`; experts are chosen by `s + expert_bias` and weighted by
    `s_e / Σ_chosen s` times the scaling factor, so the bias steers the choice and never the weights (with K
    = 1 the weight is `s` itself). `softmax`: experts are chosen by logit and weighted by the softmax over
    the chosen.

    Args:
        logits: `[T, E]`, fp32 or fp64.
        topk: K.
        score_function: `sigmoid` or `softmax`.
        expert_bias: `[E]` or None.
        num_groups: See `select_experts`.
        group_topk: See `select_experts`.
        scaling_factor: What a token's weights sum to.

    Returns:
        Weights `[T, K]` in the dtype of `logits`, differentiable, and indices int64 `[T, K]`.
    """
    if score_function == "softmax":
        chosen = select_experts(logits, topk, num_groups, group_topk)
        return logits.gather(1, chosen).softmax(dim=-1) * scaling_factor, chosen
    scores = logits.sigmoid()
    selection = scores if expert_bias is None else scores + expert_bias
    chosen = select_experts(selection.detach(), topk, num_groups, group_topk)
    weights = scores.gather(1, chosen)
    if topk > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * scaling_factor, chosen


def sequence_aux_loss(scores: torch.Tensor, topk: int, valid: torch.Tensor) -> torch.Tensor:
    """Load-balancing loss per row (DeepSeek-V3's sequence-wise loss), averaged over the rows; 1 when even.

    `E / (K · S_b²) · Σ_e (Σ_t ŝ_te)(Σ_t m_te)` where ŝ are the scores normalised over all experts, m marks
    the plain top-K of ŝ (neither groups nor expert bias) and `S_b` counts the tokens of row b that are not
    padding. Padding is left out of both sums and of `S_b`: it all looks the same, and would teach the
    router about itself. A row is one sequence even where several documents share it: the load to even out is
    that of the tokens processed together, and per-document statistics over a few dozen tokens are mostly
    noise. A row of padding alone counts as 0.

    Each row is divided by its own `S_b`, so that its loss, and a global batch's gradient, do not depend on
    which rows share a micro-batch with it. megatron-core 0.19 divides every row by the micro-batch's mean
    count instead, which weighs a padded row by (S_b / mean)²; the two are equal without padding, and at a
    micro-batch size of 1.

    Args:
        scores: `[S, B, E]`, non-negative.
        topk: K.
        valid: bool `[S, B]`, False for padding.

    Returns:
        0-dimensional, differentiable through ŝ.
    """
    experts = scores.shape[-1]
    share = scores / (scores.sum(dim=-1, keepdim=True) + 1e-20)
    chosen = share.detach().topk(topk, dim=-1).indices
    mark = torch.zeros_like(share).scatter_(-1, chosen, 1.0) * valid[..., None]
    mass = (share * valid[..., None]).sum(dim=0)  # [B, E]
    tokens = valid.sum(dim=0).clamp(min=1).to(share.dtype)  # [B]
    per_row = experts / (topk * tokens.square()) * (mass * mark.sum(dim=0)).sum(dim=-1)
    return per_row.mean()


@dataclass(frozen=True)
class RoutingRules:
    """How experts are chosen: the arguments of `route` that a model has once for all its routers."""

    topk: int
    score_function: str
    num_groups: int | None
    group_topk: int | None
    scaling_factor: float


class Routing(NamedTuple):
    """What a router says of a pass of `S · B` tokens.

    Attributes:
        weights: fp32 `[S, B, K]`, 0 for padding.
        chosen: int64 `[S, B, K]`, E for padding.
        aux_loss: Of `sequence_aux_loss`; None where it was not asked for.
        counts: int64 `[E]`, how often each expert was chosen; None where it was not asked for.
    """

    weights: torch.Tensor
    chosen: torch.Tensor
    aux_loss: torch.Tensor | None
    counts: torch.Tensor | None


Route = Callable[..., Routing]
"""Of the type of `route_and_balance`."""

Linear = Callable[[torch.Tensor, torch.Tensor, torch.Tensor | None, torch.dtype], torch.Tensor]
"""Of the type of `linear_in`."""


def linear_in(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype
) -> torch.Tensor:
    """Compute `hidden Wᵀ + b` with all operands in a type: `[…, H]` by `[E, H]` to `[…, E]`."""
    return nn.functional.linear(hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype))


def route_and_balance(
    logits: torch.Tensor,
    valid: torch.Tensor,
    expert_bias: torch.Tensor | None,
    rules: RoutingRules,
    *,
    balance: bool,
) -> Routing:
    """Choose experts and weights, and look at how even the load is.

    Args:
        logits: `[S, B, E]`, fp32 or fp64.
        valid: bool `[S, B]`, False for padding, which goes nowhere.
        expert_bias: `[E]` or None.
        rules: How.
        balance: Whether the auxiliary loss and the counts are wanted, as in a training pass.
    """
    experts = logits.shape[-1]
    weights, chosen = route(
        logits.flatten(0, 1),
        topk=rules.topk,
        score_function=rules.score_function,
        expert_bias=expert_bias,
        num_groups=rules.num_groups,
        group_topk=rules.group_topk,
        scaling_factor=rules.scaling_factor,
    )
    flat_valid = valid.reshape(-1, 1)
    weights = torch.where(flat_valid, weights, 0.0).float().view(*valid.shape, -1)
    chosen = torch.where(flat_valid, chosen, experts).view(*valid.shape, -1)
    if not balance:
        return Routing(weights, chosen, None, None)
    scores = logits.sigmoid() if rules.score_function == "sigmoid" else logits.softmax(dim=-1)
    with torch.no_grad():
        counts = _count(chosen, experts)
    return Routing(weights, chosen, sequence_aux_loss(scores, rules.topk, valid), counts)


class Router(MegatronModule, Float32Parameters):
    """Group-limited top-K routing with a load-steering bias and a sequence auxiliary loss.

    Tokens are never dropped. Padding is not routed: it gets index E (no expert) and weight 0, so it neither
    loads an expert nor counts.

    Attributes:
        weight: `[E, H]`, and `bias` `[E]`, in the model's dtype; logits are computed in
            `moe.router_dtype`.
        expert_bias: fp32 `[E]` buffer, saved with the weights, moved by the model alone.
        tokens_per_expert: int64 `[E]`, routed tokens counted since the last reset, training passes only.
        aux_loss: Coefficient times the auxiliary loss of the last training pass, or None.
    """

    float32_names = ("expert_bias",)
    config: VPTransformerConfig
    expert_bias: torch.Tensor | None
    tokens_per_expert: torch.Tensor
    bias: nn.Parameter | None

    def __init__(
        self,
        config: VPTransformerConfig,
        pg_collection: ProcessGroupCollection,
        *,
        route: Route = route_and_balance,
        linear: Linear = linear_in,
    ) -> None:
        super().__init__(config=config)
        self._route, self._linear = route, linear
        self._rules = RoutingRules(
            config.moe_router_topk,
            config.moe_router_score_function,
            config.moe_router_num_groups,
            config.moe_router_group_topk,
            config.moe_router_topk_scaling_factor,
        )
        self.tp_group = pg_collection.tp
        experts = config.num_moe_experts
        assert experts is not None
        self.dtype = _DTYPES[config.moe_router_dtype]
        self.weight = nn.Parameter(torch.empty(experts, config.hidden_size, dtype=config.params_dtype))
        if config.add_bias_linear:
            self.bias = nn.Parameter(torch.empty(experts, dtype=config.params_dtype))
        else:
            self.register_parameter("bias", None)
        steered = config.moe_router_enable_expert_bias
        self.register_buffer("expert_bias", torch.zeros(experts, dtype=torch.float32) if steered else None)
        self.register_buffer("tokens_per_expert", torch.zeros(experts, dtype=torch.int64), persistent=False)
        self.aux_loss: torch.Tensor | None = None

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """`[…, H]` to `[…, E]` in the router's dtype."""
        return self._linear(hidden, self.weight, self.bias, self.dtype)

    def forward(
        self, hidden: torch.Tensor, padding: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Route.

        Args:
            hidden: `[S, B, H]`, or `[B · S, 1, H]` of a pass whose rows run in line.
            padding: bool `[B, S]`, True where a token is padding; None when nothing is.

        Returns:
            Weights fp32 `[S · B, K]` (0 for padding) and expert indices int64 `[S · B, K]` (E for padding),
            tokens in the order of `hidden`.
        """
        config = self.config
        logits = self.logits(hidden)  # [S, B, E]
        valid = (
            torch.ones(hidden.shape[:2], dtype=torch.bool, device=hidden.device)
            if padding is None
            else ~padding.t()
        )
        in_line = valid.shape != logits.shape[:2]
        if in_line:
            logits = logits.view(*valid.t().shape, -1).transpose(0, 1)
        training = self.training and torch.is_grad_enabled()
        found = self._route(logits, valid, self.expert_bias, self._rules, balance=training)
        self.aux_loss = None
        if training:
            if found.counts is not None:
                self.tokens_per_expert += found.counts
            if config.moe_aux_loss_coeff and found.aux_loss is not None:
                self.aux_loss = config.moe_aux_loss_coeff * found.aux_loss.float()
        weights, chosen = (
            (part.transpose(0, 1) if in_line else part).flatten(0, 1)
            for part in (found.weights, found.chosen)
        )
        return weights, chosen


def _count(chosen: torch.Tensor, experts: int) -> torch.Tensor:
    """Int64 `[E]`: how often each expert was chosen; index E is nobody.

    `bincount` on CUDA has no deterministic form; integer additions are exact in any order.
    """
    flat = chosen.reshape(-1)
    counts = torch.zeros(experts + 1, dtype=torch.int64, device=flat.device)
    return counts.index_add_(0, flat, torch.ones_like(flat))[:experts]
