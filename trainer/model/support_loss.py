"""Losses that see a few log-probabilities of every token, from hidden states and the output head, in chunks.

A loss `l` of the log-probabilities `lp_i` of a few ids of a row, its support, is anything: cross-entropy, a
divergence from the top of a teacher's distribution, a policy gradient. With `c_i = d l / d lp_i` and the
probabilities p of the whole vocabulary::

    d l / d logits_v = sum_i c_i [id_i = v]  -  (sum_i c_i) p_v

so the part over the full vocabulary is one scale a row of what cross-entropy makes anyway, and the rest are
as many numbers as the support has. `c` comes from autograd over `[tokens, n]` alone, a chunk of tokens at a
time, so a loss is written as its formula, with whatever clamps and stopped gradients, and its gradient is
nobody's to write. `trainer.model.chunked_head` says how the logits are never stored.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import LossError
from trainer.model.chunked_head import (
    VocabularyShard,
    check_operands,
    chunk_size,
    head_gradients,
    run_head,
    wide_type,
)

ABSENT = -1
"""Where a row of a support has fewer ids than others."""

Rule = Callable[[Tensor, Tensor], Tensor]
"""`(logprobs [c, n], rows [c]) -> losses [c]`: the loss of each token of a chunk, already weighted, which
autograd can follow back to the log-probabilities. `rows` are the tokens' places in `hidden`. An absent id has
the log-probability -inf."""


def chunked_support_loss(
    hidden: Tensor,
    head_weight: Tensor,
    support: Tensor,
    rule: Rule,
    *,
    select: Tensor,
    highest: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `sum_t rule(log softmax(hidden_t W^T)[support_t])` and each of its terms.

    Vocabulary-parallel where `group` has several ranks, as `trainer.model.cross_entropy` is: every rank
    passes the same but for its rows of the head, and gets the same.

    Args:
        hidden: Final hidden states [T, H].
        head_weight: This rank's rows of the output head [V/tp, H].
        support: Ids over the whole vocabulary whose log-probabilities the rule sees [T, n] int64, -1 where
            there is none. An id may stand in a row several times.
        rule: The loss, see `Rule`; asked once for each chunk, in the order of tokens.
        select: Tokens that have a loss [T] bool; the others count as 0 and cost nothing.
        highest: Filled, where given, with the log-probability of each selected token's likeliest id [T].
        group: Tensor-parallel process group.
        chunk_tokens: Tokens per chunk; by default as many as `chunk_logits` allows.
        chunk_logits: Logits alive at a time; by default `chunked_head.CHUNK_LOGITS`.

    Returns:
        `(loss, losses)`: the sum, a differentiable scalar, and the terms [T], detached, 0 where not selected.
        Both float32, or float64 for float64 operands.

    Raises:
        LossError: If shapes disagree, a selected row asks for an id outside the vocabulary, or the rule gives
            anything but one loss a token.
    """
    tokens = hidden.shape[0]
    check_operands(hidden, head_weight)
    if support.dim() != 2 or support.shape[0] != tokens:
        raise LossError(f"support has shape {list(support.shape)}; hidden needs [{tokens}, n]")
    for name, tensor in {"select": select, "highest": highest}.items():
        if tensor is not None and tensor.shape != (tokens,):
            raise LossError(f"{name} has shape {list(tensor.shape)}; hidden needs [{tokens}]")
    if chunk_tokens is None:
        chunk_tokens = chunk_size(hidden, head_weight, chunk_logits)
    loss, losses = _ChunkedSupportLoss.apply(
        hidden,
        head_weight,
        support,
        rule,
        torch.nonzero(select).squeeze(1),
        highest,
        group,
        chunk_tokens,
        torch.is_grad_enabled(),
    )
    return loss, losses


class _ChunkedSupportLoss(torch.autograd.Function):
    """Gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        support: Tensor,
        rule: Rule,
        chosen: Tensor,
        highest: Tensor | None,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        shard = VocabularyShard(head_weight.shape[0], group)
        _check_support(support[chosen], shard.vocabulary)
        losses = torch.zeros(len(hidden), dtype=wide_type(hidden), device=hidden.device)

        def turn(logits: Tensor, at: Tensor, want_gradient: bool) -> None:
            ids = support[at]
            local = ids - shard.first
            # Not `nonzero`, which would wait for the device: ids of other ranks are looked up anywhere here.
            mine = (local >= 0) & (local < shard.rows)
            columns = local.clamp(0, shard.rows - 1)
            asked = torch.where(mine, logits.gather(1, columns), 0.0)
            log_sum, log_scale, peak, found = shard.softmax_(logits, asked.t())
            logprobs = found.t() - log_sum.unsqueeze(1)
            logprobs = logprobs.masked_fill(ids == ABSENT, -torch.inf)
            if highest is not None:
                highest[at] = (peak - log_sum).to(highest.dtype)
            losses[at], slopes = _ask(rule, logprobs, at, want_gradient)
            if slopes is None:
                return
            slopes = slopes.masked_fill(ids == ABSENT, 0.0)
            # The buffer now holds exp(logit - local maximum).
            logits.mul_((log_scale.exp() * -slopes.sum(dim=1)).unsqueeze(1))
            # An id that stands in a row several times gets its sum once and 0 after that, so that the order
            # in which a GPU adds them does not show.
            logits.scatter_add_(1, columns, torch.where(mine, _joined(ids, slopes), 0.0))

        run_head(ctx, hidden, head_weight, chosen, group, chunk_tokens, grad_enabled, turn)
        ctx.mark_non_differentiable(losses)
        return losses[chosen].sum(), losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *head_gradients(ctx, grad_loss), None, None, None, None, None, None, None


def _check_support(ids: Tensor, vocabulary: int) -> None:
    if ids.numel() and (int(ids.min()) < ABSENT or int(ids.max()) >= vocabulary):
        raise LossError(
            f"ids of the support run from {int(ids.min())} to {int(ids.max())}; the vocabulary has "
            f"{vocabulary} ids, and {ABSENT} means none"
        )


def _ask(rule: Rule, logprobs: Tensor, at: Tensor, want_gradient: bool) -> tuple[Tensor, Tensor | None]:
    """Return the rule's losses [c] and, where wanted, their slopes in the log-probabilities [c, n]."""
    with torch.set_grad_enabled(want_gradient):
        logprobs.requires_grad_(want_gradient)
        losses = rule(logprobs, at)
        if losses.shape != at.shape:
            raise LossError(f"the rule gave losses {list(losses.shape)} for {len(at)} tokens")
        slopes = None
        if want_gradient:
            # A rule that stops every gradient is measured and trains nothing.
            (slopes,) = (
                torch.autograd.grad(losses.sum(), logprobs)
                if losses.requires_grad
                else (torch.zeros_like(logprobs),)
            )
    return losses.detach(), slopes


def _joined(ids: Tensor, values: Tensor) -> Tensor:
    """Sum the values [c, n] of equal ids of a row into the first of them; 0 at the others."""
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    first = same.int().argmax(dim=2) == torch.arange(ids.shape[1], device=ids.device)
    return torch.where(first, (same * values.unsqueeze(1)).sum(dim=2), 0.0)
