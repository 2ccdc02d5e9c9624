"""Runs NorMuon over all matrices of this rank, equal shapes together.

All experts of all layers have two shapes, so a few hundred large batched products replace a loop over tens of
thousands of matrices. A batch is cut so that its temporaries stay within a fixed size.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch

from trainer.optim.normuon import nesterov_momentum, normuon_update
from trainer.optim.parts import Part
from trainer.optim.routing import Route
from trainer.optim.topology import Group

#: Elements of one batch of whole matrices (256 MiB in float32); about five such temporaries live at once.
CHUNK_ELEMENTS = 1 << 26


@dataclass(frozen=True)
class _Slice:
    """Some matrices `[k, m, n]` of one part."""

    grad: torch.Tensor
    master: torch.Tensor
    weight: torch.Tensor
    momentum: torch.Tensor
    second_momentum: torch.Tensor


@dataclass(frozen=True)
class MatrixBatch:
    """Matrices that are updated in one go: equal shape, split, rate and decay.

    Attributes:
        route: Of any of its parts.
        tensor_dim: Matrix axis that tensor parallelism splits, None where it does not.
        slices: The matrices.
    """

    route: Route
    tensor_dim: int | None
    slices: list[_Slice]


def plan_matrices(
    parts: Sequence[Part], tensor_group: Group, *, chunk_elements: int = CHUNK_ELEMENTS
) -> list[MatrixBatch]:
    """Cut NorMuon parts into batches of equal matrices; depends on shapes and order alone.

    Args:
        parts: NorMuon parts, in the same order on every tensor-parallel rank.
        tensor_group: Tensor-parallel ranks.
        chunk_elements: Bound on the elements of one batch of whole matrices.
    """
    groups: dict[tuple[tuple[int, int], int | None, Route, torch.dtype, torch.dtype], list[Part]] = {}
    for part in parts:
        kept = (part.weight.dtype, part.master.dtype)
        groups.setdefault((part.matrix, part.tensor_dim, part.route, *kept), []).append(part)
    batches = []
    for ((m, n), tensor_dim, route, *_), members in groups.items():
        whole = m * n * (tensor_group.size if tensor_dim is not None else 1)
        for chunk in _chunks(members, max(1, chunk_elements // whole)):
            batches.append(MatrixBatch(route, tensor_dim, chunk))
    return batches


def step_matrices(
    batches: Sequence[MatrixBatch],
    *,
    rate: Callable[[Route], float],
    mu: float,
    beta2: float,
    eps: float,
    orthogonalize: Callable[[torch.Tensor], torch.Tensor],
    tensor_group: Group,
) -> None:
    """One NorMuon step of the master weights of some batches, in place.

    Matrices that are split over tensor-parallel ranks are gathered before they are orthogonalised; every one
    of those ranks then computes the same update and keeps its piece, so the result does not depend on the
    split.

    Args:
        batches: Of `plan_matrices`.
        rate: Learning rate of a route in this step.
        mu: Decay of the momentum.
        beta2: Decay of the row statistic.
        eps: See `trainer.optim.normuon.normuon_update`.
        orthogonalize: `[B, m, n] → [B, m, n]`, float32 out.
        tensor_group: Tensor-parallel ranks.
    """
    for batch in batches:
        lr = rate(batch.route)
        update = _update(batch.slices, mu, beta2, eps, orthogonalize, batch.tensor_dim, tensor_group)
        masters = [piece.master for piece in batch.slices]
        if batch.route.weight_decay:
            torch._foreach_mul_(masters, 1 - lr * batch.route.weight_decay)
        torch._foreach_add_(masters, update.split([master.size(0) for master in masters]), alpha=-lr)


def _chunks(parts: Sequence[Part], limit: int) -> Iterator[list[_Slice]]:
    chunk: list[_Slice] = []
    room = limit
    for part in parts:
        tensors = [
            part.batched(tensor)
            for tensor in (
                part.grad,
                part.master,
                part.weight,
                part.state["momentum_buffer"],
                part.state["second_momentum_buffer"],
            )
        ]
        start, count = 0, tensors[0].size(0)
        while start < count:
            stop = min(count, start + room)
            chunk.append(_Slice(*(tensor[start:stop] for tensor in tensors)))
            room -= stop - start
            start = stop
            if room == 0:
                yield chunk
                chunk, room = [], limit
    if chunk:
        yield chunk


def _update(
    chunk: Sequence[_Slice],
    mu: float,
    beta2: float,
    eps: float,
    orthogonalize: Callable[[torch.Tensor], torch.Tensor],
    tensor_dim: int | None,
    group: Group,
) -> torch.Tensor:
    look_ahead = _join(
        nesterov_momentum([piece.grad for piece in chunk], [piece.momentum for piece in chunk], mu)
    )
    stored = [piece.second_momentum for piece in chunk]
    second = _join(stored)
    if tensor_dim is not None:
        look_ahead = group.gather(look_ahead, tensor_dim + 1)
        if tensor_dim == 0:
            second = group.gather(second, 1)
    update = normuon_update(look_ahead, second, beta2=beta2, eps=eps, orthogonalize=orthogonalize)
    if tensor_dim is not None:
        size = update.size(tensor_dim + 1) // group.size
        update = update.narrow(tensor_dim + 1, group.rank * size, size)
        if tensor_dim == 0:
            second = second.narrow(1, group.rank * size, size)
    if second is not stored[0]:
        torch._foreach_copy_(stored, list(second.split([piece.size(0) for piece in stored])))
    return update


def _join(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    return tensors[0] if len(tensors) == 1 else torch.cat(list(tensors))
