"""Cross-entropy from hidden states and the output head, a chunk of tokens at a time.

With a vocabulary of 200 thousand the logits of a micro-batch are far larger than the model's activations.
They are never stored: a chunk's logits are made, reduced to one loss per token, turned in place into their
own gradient, multiplied into the gradients of the hidden states and the head, and overwritten. Since the loss
is a scalar, the gradients can be computed in the forward pass and scaled in the backward one, which spares
making all logits a second time. Tokens that nobody asks for (prompts, padding) are left out of all of it.

With the probabilities p and a one-hot target y, `d ce / d logits = p - y`.

Types: products take their operands as they are (bfloat16 on a GPU) and accumulate in float32; softmax and
loss are float32; the head's gradient is summed over chunks in float32 and rounded to the head's type once per
micro-batch, like the gradient of every other weight. Sums over micro-batches belong to the optimizer's
float32 main gradients. Float64 operands stay float64.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from trainer.errors import LossError

_CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}  # logits alive at a time: 64 MiB and 1 GiB of float32


def chunked_cross_entropy(
    hidden: Tensor,
    head_weight: Tensor,
    labels: Tensor,
    token_weights: Tensor,
    *,
    select: Tensor | None = None,
    group: dist.ProcessGroup | None = None,
    chunk_tokens: int | None = None,
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
        chunk_tokens: Tokens per chunk; by default as many as fit about 64 MiB of logits on a CPU, 1 GiB on a
        GPU.

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
    if hidden.dim() != 2 or head_weight.dim() != 2 or hidden.shape[1] != head_weight.shape[1]:
        found = f"hidden {list(hidden.shape)} and head {list(head_weight.shape)}"
        raise LossError(f"{found} must be [T, H] and [V/tp, H]")
    if hidden.dtype != head_weight.dtype:
        raise LossError(f"hidden is {hidden.dtype}, the head {head_weight.dtype}; they must agree")
    if chunk_tokens is None:
        chunk_tokens = max(1, _CHUNK_LOGITS[hidden.device.type] // head_weight.shape[0])
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
        wide = torch.promote_types(hidden.dtype, torch.float32)
        want_hidden = grad_enabled and ctx.needs_input_grad[0]
        want_head = grad_enabled and ctx.needs_input_grad[1]
        head = _operand(head_weight)
        shard = _VocabularyShard(head_weight.shape[0], group)
        shard.check(labels[chosen])

        ce = torch.zeros(len(hidden), dtype=wide, device=hidden.device)
        grad_chosen = grad_head = None
        if want_hidden:
            grad_chosen = torch.zeros(len(chosen), hidden.shape[1], dtype=wide, device=hidden.device)
        if want_head:
            grad_head = torch.zeros(head_weight.shape, dtype=wide, device=hidden.device)
        buffer = torch.empty(min(chunk_tokens, len(chosen)), len(head), dtype=wide, device=hidden.device)
        for start in range(0, len(chosen), chunk_tokens):
            at = chosen[start : start + chunk_tokens]
            states = _operand(hidden[at])
            logits = _product(states, head.t(), out=buffer[: len(at)])
            ce[at], log_scale, rows, columns = shard.cross_entropy_(logits, labels[at])
            if grad_chosen is None and grad_head is None:
                continue
            # The buffer now holds exp(logit - local maximum); with the two factors joined per row it becomes
            # weight * softmax, and less the weight at the target it is the gradient.
            weights = token_weights[at].to(wide)
            logits.mul_((weights * log_scale.exp()).unsqueeze(1))
            logits[rows, columns] -= weights[rows]
            grad_logits = logits.to(states.dtype)
            if grad_chosen is not None:
                _product(grad_logits, head, out=grad_chosen[start : start + chunk_tokens])
            if grad_head is not None:
                _add_product_(grad_head, grad_logits.t(), states)
            del grad_logits  # or it would still be there while the next chunk's is made

        if grad_chosen is not None and shard.size > 1:
            dist.all_reduce(grad_chosen, group=group)
        ctx.save_for_backward(chosen, grad_chosen, grad_head)
        ctx.like = (hidden.shape, hidden.dtype, head_weight.dtype)
        ctx.mark_non_differentiable(ce)
        return (ce[chosen] * token_weights[chosen].to(wide)).sum(), ce

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_loss: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        chosen, grad_chosen, grad_head = ctx.saved_tensors
        shape, hidden_dtype, head_dtype = ctx.like
        to_hidden = to_head = None
        if grad_chosen is not None:
            to_hidden = torch.zeros(shape, dtype=hidden_dtype, device=grad_chosen.device)
            to_hidden[chosen] = (grad_chosen * grad_loss).to(hidden_dtype)
        if grad_head is not None:
            to_head = (grad_head * grad_loss).to(head_dtype)
        return to_hidden, to_head, None, None, None, None, None, None


class _VocabularyShard:
    """The rows of the head that this rank holds, and the softmax over all ranks' rows."""

    def __init__(self, rows: int, group: dist.ProcessGroup | None):
        self.group = group
        self.size = 1 if group is None else group.size()
        self.first = 0 if group is None else group.rank() * rows
        self.rows = rows

    def check(self, labels: Tensor) -> None:
        vocabulary = self.rows * self.size
        if labels.numel() and (int(labels.min()) < 0 or int(labels.max()) >= vocabulary):
            raise LossError(
                f"labels run from {int(labels.min())} to {int(labels.max())}; the vocabulary has"
                f" {vocabulary} ids"
            )

    def cross_entropy_(self, logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Cross-entropy of a chunk of local logits [c, V/tp].

        The logits are overwritten by `exp(logit - maximum of the row)`.

        Returns:
            `(ce, log_scale, rows, columns)`: the losses [c]; the log of what turns a row of the overwritten
            Buffer into probabilities [c]; and the places in the buffer of the targets that this rank holds.
        """
        local = labels - self.first
        rows = torch.nonzero((local >= 0) & (local < self.rows)).squeeze(1)
        columns = local[rows]
        target = logits.new_zeros(len(labels))
        target[rows] = logits[rows, columns]
        maximum = logits.amax(dim=1)
        logits.sub_(maximum.unsqueeze(1)).exp_()
        log_sum = logits.sum(dim=1).log_().add_(maximum)
        if self.size > 1:
            mine = torch.stack((log_sum, target))
            everyones = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(everyones, mine, group=self.group)
            gathered = torch.stack(everyones)
            log_sum = gathered[:, 0].logsumexp(dim=0)
            target = gathered[:, 1].sum(dim=0)
        return log_sum - target, maximum - log_sum, rows, columns


def _operand(tensor: Tensor) -> Tensor:
    """Return the matrix in the type that products take it in: its own on a GPU, at least float32 on a CPU.

    CPUs multiply bfloat16 slowly and round the result to it; a GPU keeps float32 results of bfloat16
    operands.
    """
    if tensor.device.type == "cpu":
        return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    return tensor


def _product(left: Tensor, right: Tensor, *, out: Tensor) -> Tensor:
    """`left @ right` written to `out` and accumulated in its type, which is a wide one."""
    if left.dtype == out.dtype:
        return torch.mm(left, right, out=out)
    return torch.mm(left, right, out_dtype=out.dtype, out=out)


def _add_product_(total: Tensor, left: Tensor, right: Tensor) -> None:
    """`total += left @ right`, accumulated in the type of `total`."""
    if left.dtype == total.dtype:
        total.addmm_(left, right)
    else:
        torch.addmm(total, left, right, out_dtype=total.dtype, out=total)
