"""The output head a chunk of tokens at a time: logits that become their own gradient.

What is shared by the losses through the head. A chunk's logits are made into one buffer; the loss looks at
them and turns them in place into the gradient of the logits; that is multiplied into the gradients of the
hidden states and the head, and overwritten by the next chunk. Since a loss is a scalar, the gradients can be
computed in the forward pass and scaled in the backward one, which spares making all logits a second time.

Types: products take their operands as they are (bfloat16 on a GPU) and accumulate in float32; softmax and
loss are float32; the head's gradient is summed over chunks in float32 and rounded to the head's type once per
micro-batch, like the gradient of every other weight. Sums over micro-batches belong to the optimizer's
float32 main gradients. Float64 operands stay float64.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.errors import LossError

CHUNK_LOGITS = {"cpu": 1 << 24, "cuda": 1 << 28}
"""Logits alive at a time: 64 MiB and 1 GiB of float32."""

_CACHED_BYTES = 1 << 21
"""Of a core's cache: what its share of the rows that a loss is taken of at a time may fill."""

Turn = Callable[[Tensor, Tensor, bool], Tensor | None]
"""`(logits [c, V/tp], rows [c], gradient wanted)`: takes the loss of a chunk, those rows of `hidden`.
Where a gradient is wanted it overwrites the logits by it, or returns it in the operands' type."""


def check_operands(hidden: Tensor, head_weight: Tensor) -> None:
    """Refuse hidden states and a head that cannot be multiplied.

    Args:
        hidden: Final hidden states [T, H].
        head_weight: This rank's rows of the output head [V/tp, H].

    Raises:
        LossError: If shapes or types disagree.
    """
    if hidden.dim() != 2 or head_weight.dim() != 2 or hidden.shape[1] != head_weight.shape[1]:
        found = f"hidden {list(hidden.shape)} and head {list(head_weight.shape)}"
        raise LossError(f"{found} must be [T, H] and [V/tp, H]")
    if hidden.dtype != head_weight.dtype:
        raise LossError(f"hidden is {hidden.dtype}, the head {head_weight.dtype}; they must agree")


def chunk_size(hidden: Tensor, head_weight: Tensor, logits: int | None = None) -> int:
    """Tokens per chunk that a number of logits allows, by default `CHUNK_LOGITS` of the operands' device."""
    return max(1, (logits or CHUNK_LOGITS[hidden.device.type]) // head_weight.shape[0])


def wide_type(hidden: Tensor) -> torch.dtype:
    """Type of softmax and loss: float32, or float64 for float64 operands."""
    return torch.promote_types(hidden.dtype, torch.float32)


def run_head(
    ctx: Any,
    hidden: Tensor,
    head_weight: Tensor,
    chosen: Tensor,
    group: dist.ProcessGroup | None,
    chunk_tokens: int,
    grad_enabled: bool,
    turn: Turn,
) -> None:
    """Run the forward pass of an `autograd.Function` whose first two inputs are hidden states and head.

    Args:
        ctx: Of the function; `head_gradients` finds in it what it needs.
        hidden: Final hidden states [T, H].
        head_weight: This rank's rows of the output head [V/tp, H].
        chosen: The rows of `hidden` that take part, int64.
        group: Tensor-parallel process group.
        chunk_tokens: Tokens per chunk.
        grad_enabled: Whether the caller wants gradients at all.
        turn: The loss.
    """
    want_hidden = grad_enabled and ctx.needs_input_grad[0]
    want_head = grad_enabled and ctx.needs_input_grad[1]
    wide = wide_type(hidden)
    head = _operand(head_weight)
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
        grad_logits = None
        for rows in cached_rows(logits, group):
            grad_logits = turn(logits[rows], at[rows], want_hidden or want_head)
        if grad_chosen is None and grad_head is None:
            continue
        if grad_logits is None:
            grad_logits = logits.to(states.dtype)
        if grad_chosen is not None:
            _product(grad_logits, head, out=grad_chosen[start : start + chunk_tokens])
        if grad_head is not None:
            _add_product_(grad_head, grad_logits.t(), states)
        del grad_logits  # or it would still be there while the next chunk's is made

    if grad_chosen is not None and group is not None and group.size() > 1:
        dist.all_reduce(grad_chosen, group=group)
    ctx.save_for_backward(chosen, grad_chosen, grad_head)
    ctx.like = (hidden.shape, hidden.dtype, head_weight.dtype)


def cached_rows(logits: Tensor, group: dist.ProcessGroup | None = None) -> list[slice]:
    """Return the rows of a chunk that a loss is taken of at a time.

    A loss reads and writes its logits several times over. On a CPU that is done for a few rows at a time,
    which stay in the caches of its cores. There are two at least, unless the chunk is a single one: one row
    alone is summed by several threads, in another order. Ranks that share the vocabulary would meet for each
    of them, so they take the chunk whole, and so does a GPU.

    Args:
        logits: `[c, V/tp]`.
        group: Tensor-parallel process group.
    """
    count = len(logits)
    if logits.is_cuda or (group is not None and group.size() > 1):
        return [slice(0, count)]
    threads = torch.get_num_threads()
    rows = max(2, threads * max(1, _CACHED_BYTES // (logits.shape[1] * logits.element_size())))
    starts = range(0, max(count - 1, 1), rows)
    return [slice(start, count if start == starts[-1] else start + rows) for start in starts]


def head_gradients(ctx: Any, grad_loss: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Run the backward pass of such a function: the gradients of hidden states and head, scaled.

    Args:
        ctx: Of the function, as `run_head` left it.
        grad_loss: Gradient of the scalar that the function returned.
    """
    chosen, grad_chosen, grad_head = ctx.saved_tensors
    shape, hidden_dtype, head_dtype = ctx.like
    to_hidden = to_head = None
    if grad_chosen is not None:
        to_hidden = torch.zeros(shape, dtype=hidden_dtype, device=grad_chosen.device)
        to_hidden[chosen] = (grad_chosen * grad_loss).to(hidden_dtype)
    if grad_head is not None:
        to_head = (grad_head * grad_loss).to(head_dtype)
    return to_hidden, to_head


class VocabularyShard:
    """The rows of the head that this rank holds, and the softmax over all ranks' rows.

    Attributes:
        group: The tensor-parallel ranks.
        size: How many.
        first: First id of this rank.
        rows: Ids of this rank.
        vocabulary: Ids of all ranks.
    """

    def __init__(self, rows: int, group: dist.ProcessGroup | None):
        self.group = group
        self.size = 1 if group is None else group.size()
        self.first = 0 if group is None else group.rank() * rows
        self.rows = rows
        self.vocabulary = rows * self.size

    def softmax_(self, logits: Tensor, asked: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Normalise a chunk of local logits [c, V/tp] over the whole vocabulary.

        The logits are overwritten by `exp(logit - maximum of the row)`.

        Args:
            logits: Of this rank.
            asked: Logits [k, c] that this rank holds of ids that are asked for, 0 for other ranks'.

        Returns:
            `(log_sum, log_scale, highest, asked)`: the log of the row's sum of exponentials [c]; the log of
            what turns a row of the overwritten buffer into probabilities [c]; the largest logit of the row
            over all ranks [c]; and the logits that are asked for, whoever holds them [k, c].
        """
        maximum = logits.amax(dim=1)
        logits.sub_(maximum.unsqueeze(1)).exp_()
        log_sum = logits.sum(dim=1).log_().add_(maximum)
        highest = maximum
        if self.size > 1:
            mine = torch.cat((log_sum.unsqueeze(0), maximum.unsqueeze(0), asked))
            everyones = [torch.empty_like(mine) for _ in range(self.size)]
            dist.all_gather(everyones, mine, group=self.group)
            gathered = torch.stack(everyones)
            log_sum = gathered[:, 0].logsumexp(dim=0)
            highest = gathered[:, 1].amax(dim=0)
            asked = gathered[:, 2:].sum(dim=0)
        return log_sum, maximum - log_sum, highest, asked


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
