"""Cross-entropy from hidden states and the output head, a chunk of tokens at a time.

With a vocabulary of 200 thousand the logits of a micro-batch are far larger than the model's activations.
They are never stored: `trainer.model.chunked_head` makes a chunk of them, which is reduced to one loss per
token and turned in place into its own gradient. Tokens that nobody asks for (prompts, padding) are left out
of all of it.

With the probabilities p and a one-hot target y, `d ce / d logits = p - y`.
"""

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


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    select: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
    chunk_logits: int | None = None,
) -> tuple[Tensor, Tensor]:
    """Compute `sum_t token_weights[t] * ce_t` and each `ce_t = -log softmax(hidden_t W^T)[labels_t]`.

    Vocabulary-parallel where `group` has several ranks: rank r holds rows `r * V/tp` to `(r + 1) *
    V/tp` of the head, and every rank passes the same `hidden`, `labels`, `token_weights` and
    `select`. The gradient of `hidden` is then already summed over the group.

    Args:
        hidden: Final hidden states [T, H].
        head_weight: This rank's rows of the output head [V/tp, H].
        labels: Target ids over the whole vocabulary [T] int64.
        token_weights: Weight of each token in the sum [T] float32; no gradient flows to it.
        select: Tokens whose loss is wanted [T] bool; those with a nonzero weight by default. A selected token
            of weight 0 gets its loss and leaves the gradient alone; a token that is not selected counts as 0.
        group: Tensor-parallel process group.
        chunk_tokens: Tokens per chunk; by default as many as `chunk_logits` allows.
        chunk_logits: Logits alive at a time; by default `chunked_head.CHUNK_LOGITS`.

    Returns:
        `(loss, ce)`: the weighted sum, a differentiable scalar, and the per-token losses [T], detached, 0
        Where not selected. Both float32, or float64 for float64 operands.

    Raises:
        LossError: If shapes disagree or a selected label is outside the vocabulary.
    """
    tokens = hidden.shape[0]
    shapes = {"labels": labels, "token_weights": token_weights}
    if select is not None:
        shapes["select"] = select
    for name, tensor in shapes.items():
        if tensor.shape != (tokens,):
            raise LossError(f"{name} has shape {list(tensor.shape)}; hidden needs [{tokens}]")
    check_operands(hidden, head_weight)
    if chunk_tokens is None:
        chunk_tokens = chunk_size(hidden, head_weight, chunk_logits)
    chosen = torch.nonzero((token_weights != 0) if select is None else select).squeeze(1)
    loss, ce = _ChunkedCrossEntropy.apply(
        hidden, head_weight, labels, token_weights, chosen, group, chunk_tokens, torch.is_grad_enabled()
    )
    return loss, ce


class _ChunkedCrossEntropy(torch.autograd.Function):
    """Gradients in the forward pass; the backward pass only scales them."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head_weight: Tensor,
        labels: Tensor,
        token_weights: Tensor,
        chosen: Tensor,
        group: dist.ProcessGroup | None,
        chunk_tokens: int,
        grad_enabled: bool,
    ) -> tuple[Tensor, Tensor]:
        wide = wide_type(hidden)
        shard = VocabularyShard(head_weight.shape[0], group)
        _check_labels(labels[chosen], shard.vocabulary)
        ce = torch.zeros(len(hidden), dtype=wide, device=hidden.device)

        def in_one_kernel(logits: Tensor, at: Tensor, want_gradient: bool) -> Tensor | None:
            of_rows, grad_logits = cross_entropy_of_rows(
                logits, labels[at], token_weights[at], hidden.dtype if want_gradient else None
            )
            ce[at] = of_rows
            return grad_logits

        def turn(logits: Tensor, at: Tensor, want_gradient: bool) -> None:
            local = labels[at] - shard.first
            rows = torch.nonzero((local >= 0) & (local < shard.rows)).squeeze(1)
            columns = local[rows]
            target = logits.new_zeros(len(at))
            target[rows] = logits[rows, columns]
            log_sum, log_scale, _, asked = shard.softmax_(logits, target.unsqueeze(0))
            ce[at] = log_sum - asked[0]
            if want_gradient:
                # The buffer now holds exp(logit - local maximum); with the two factors joined per row it
                # becomes weight * softmax, and less the weight at the target it is the gradient.
                weights = token_weights[at].to(wide)
                logits.mul_((weights * log_scale.exp()).unsqueeze(1))
                logits[rows, columns] -= weights[rows]

        kernel = uses_kernel(hidden, shard)
        by = in_one_kernel if kernel else turn
        run_head(ctx, hidden, head_weight, chosen, group, chunk_tokens, grad_enabled, by)
        ctx.mark_non_differentiable(ce)
        return (ce[chosen] * token_weights[chosen].to(wide)).sum(), ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        return *head_gradients(ctx, grad_loss), None, None, None, None, None, None


def uses_kernel(hidden: Tensor, shard: VocabularyShard) -> bool:
    """Whether a chunk is left to the kernel: on a GPU, where this rank holds the whole vocabulary."""
    return hidden.is_cuda and hidden.dtype != torch.float64 and shard.size == 1


def cross_entropy_of_rows(
    logits: Tensor, labels: Tensor, weights: Tensor, dtype: torch.dtype | None
) -> tuple[Tensor, Tensor | None]:
    """Compute the cross-entropy of each row, and its weighted gradient, by `trainer.model.softmax_kernel`.

    Args:
        logits: fp32 `[c, V]`, left as they are.
        labels: int64 `[c]`.
        weights: fp32 `[c]`.
        dtype: Of the gradient; None for none.

    Returns:
        fp32 `[c]`, and `[c, V]` or None.
    """
    from trainer.model.softmax_kernel import cross_entropy_rows

    ce = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    grad = None if dtype is None else torch.empty_like(logits, dtype=dtype)
    cross_entropy_rows[(len(logits),)](
        logits, labels, weights.float(), ce, logits if grad is None else grad, VOCABULARY=logits.shape[1],
        BLOCK=_KERNEL_COLUMNS, GRADIENT=grad is not None, num_warps=16,
    )  # fmt: skip
    return ce, grad


_KERNEL_COLUMNS = 8192
"""Columns that a program of the kernel works off at a time."""


def _check_labels(labels: Tensor, vocabulary: int) -> None:
    if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= vocabulary):
        raise LossError(
            f"labels run from {int(labels.min())} to {int(labels.max())}; the vocabulary has {vocabulary} ids"
        )
