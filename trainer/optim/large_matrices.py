"""NorMuon of all other matrices on a GPU: kernels at both ends, batched products between.

The same update as `trainer.optim.matrices` computes, with learning rate, clipping and whether to change
anything at all read from the device, and with master weights kept either way.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from trainer.contract.schema.training import OptimizerConfig
from trainer.optim.matrices import MatrixBatch, plan_matrices
from trainer.optim.normuon import normuon_update
from trainer.optim.parts import Part
from trainer.optim.routing import Route
from trainer.optim.tables import CHUNK, aligned, chunks, table
from trainer.optim.topology import Group

CHUNK_ELEMENTS = 1 << 24
"""Elements of one batch of whole matrices (64 MiB in float32): a GPU that is nearly full has no more."""


@dataclass(frozen=True)
class _Batch:
    """Matrices of one batch, as kernels see them."""

    plan: MatrixBatch
    shape: tuple[int, int, int]
    addresses: Tensor
    chunks: Tensor
    aligned: bool


class LargeMatrices:
    """The matrices that are updated by batched products.

    Args:
        parts: NorMuon parts, in the same order on every tensor-parallel rank.
        rows: A route's row in the table of rates.
        settings: Of the optimizer.
        orthogonalize: `[B, m, n] → [B, m, n]`, float32 out.
        tensor_group: Tensor-parallel ranks.
        chunk_elements: Bound on the elements of one batch of whole matrices.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        rows: Mapping[Route, int],
        settings: OptimizerConfig,
        orthogonalize: Callable[[Tensor], Tensor],
        tensor_group: Group,
        *,
        chunk_elements: int = CHUNK_ELEMENTS,
    ) -> None:
        self._settings, self._orthogonalize, self._group = settings, orthogonalize, tensor_group
        plan = plan_matrices(parts, tensor_group, chunk_elements=chunk_elements)
        self._batches = [_batch(batch, rows[batch.route]) for batch in plan]

    def step(self, rates: Tensor, gate: Tensor) -> None:
        """One step of all of them: momentum, row statistic, master weight and weight, in place.

        Args:
            rates: fp32 `[routes, 4]`, see `trainer.optim.device_step`.
            gate: fp32 `[2]`, see `trainer.optim.device_step`.
        """
        for batch in self._batches:
            self._step(batch, rates, gate)

    def _step(self, batch: _Batch, rates: Tensor, gate: Tensor) -> None:
        import triton.language as tl

        from trainer.optim.elementwise_kernels import apply_update, look_ahead

        first, programs = batch.plan.slices[0], batch.chunks.size(0)
        narrow = first.momentum.dtype == torch.bfloat16
        stack = torch.empty(batch.shape, dtype=torch.float32, device=batch.addresses.device)
        look_ahead[(programs,)](
            batch.addresses,
            batch.chunks,
            gate,
            stack,
            self._settings.normuon_momentum,
            CHUNK=CHUNK,
            ALIGNED=batch.aligned,
            MOMENTUM=tl.bfloat16 if narrow else tl.float32,
            num_warps=8,
        )
        apply_update[(programs,)](
            batch.addresses,
            batch.chunks,
            rates,
            gate,
            self._update(batch.plan, stack, gate),
            CHUNK=CHUNK,
            ALIGNED=batch.aligned,
            LOW_HALF=first.master.dtype == torch.int16,
            num_warps=8,
        )

    def _update(self, batch: MatrixBatch, stack: Tensor, gate: Tensor) -> Tensor:
        """Turn look-aheads into updates of the same shape; row statistics move where the gate is open."""
        stored, dim, group = [piece.second_momentum for piece in batch.slices], batch.tensor_dim, self._group
        second = torch.cat(stored)
        if dim is not None:
            stack = group.gather(stack, dim + 1)
            second = group.gather(second, 1) if dim == 0 else second
        moved = second.clone()
        update = normuon_update(
            stack,
            moved,
            beta2=self._settings.normuon_beta2,
            eps=self._settings.normuon_eps,
            orthogonalize=self._orthogonalize,
        )
        second = torch.where(gate[1] > 0, moved, second)
        if dim is not None:
            size = update.size(dim + 1) // group.size
            update = update.narrow(dim + 1, group.rank * size, size)
            second = second.narrow(1, group.rank * size, size) if dim == 0 else second
        torch._foreach_copy_(stored, list(second.split([piece.size(0) for piece in stored])))
        return update.contiguous()  # a tall one was made lying down


def _batch(plan: MatrixBatch, row: int) -> _Batch:
    rows, lengths, place = [], [], 0
    for piece in plan.slices:
        tensors = (piece.grad, piece.momentum, piece.master, piece.weight)
        lengths.append(piece.grad.numel())
        rows.append([*(tensor.data_ptr() for tensor in tensors), place, row, lengths[-1]])
        place += lengths[-1]
    first = plan.slices[0].grad
    whole = all(aligned(piece.grad, piece.momentum, piece.master, piece.weight) for piece in plan.slices)
    return _Batch(
        plan,
        (place // (first.size(1) * first.size(2)), first.size(1), first.size(2)),
        table(rows, first.device),
        chunks(lengths, first.device),
        whole,
    )
