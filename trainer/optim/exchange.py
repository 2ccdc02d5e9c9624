"""Hands updated weights from the rank that owns them to the other ranks of its group."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.optim.parts import Ownership
from trainer.optim.routing import Routed
from trainer.optim.topology import Group, Topology

#: Bytes of one all-gather, all ranks' slots together.
BUCKET_BYTES = 1 << 28
#: Pieces start on 16-byte boundaries within a slot.
ALIGN_BYTES = 16


@dataclass(frozen=True)
class _Piece:
    weight: torch.Tensor  # flat view into the parameter
    owner: int
    offset: int  # bytes into the owner's slot


@dataclass(frozen=True)
class _Bucket:
    group: Group
    slot: int  # bytes
    pieces: list[_Piece]


class WeightExchange:
    """All-gathers weights in buckets of bytes, so that every backend moves every type bit for bit."""

    def __init__(
        self,
        routed: Sequence[Routed],
        ownership: Ownership,
        topology: Topology,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Lays out the buckets; the same on every rank of a group.

        Args:
            routed: All parameters.
            ownership: Who owns which rows.
            topology: Process groups.
            bucket_bytes: A bucket is closed before it would grow beyond this.
        """
        self._buckets: list[_Bucket] = []
        for expert, group in ((False, topology.data), (True, topology.expert_data)):
            if group.size > 1:
                shares = [s for s in ownership.shares if routed[s.unit].route.expert_parallel is expert]
                weights = [
                    (
                        ownership.rows(s.unit, routed[s.unit].param.detach())[s.start : s.stop].view(-1),
                        s.owner,
                    )
                    for s in shares
                ]
                self._fill(group, weights, bucket_bytes)

    def _fill(self, group: Group, weights: Sequence[tuple[torch.Tensor, int]], bucket_bytes: int) -> None:
        pieces: list[_Piece] = []
        used = [0] * group.size
        for weight, owner in weights:
            size = -(-weight.nbytes // ALIGN_BYTES) * ALIGN_BYTES
            if pieces and max(max(used), used[owner] + size) * group.size > bucket_bytes:
                self._buckets.append(_Bucket(group, max(used), pieces))
                pieces, used = [], [0] * group.size
            pieces.append(_Piece(weight, owner, used[owner]))
            used[owner] += size
        if pieces:
            self._buckets.append(_Bucket(group, max(used), pieces))

    def run(self) -> None:
        """Brings every rank's weights up to date; collective."""
        for bucket in self._buckets:
            device = bucket.pieces[0].weight.device
            received = torch.empty(bucket.group.size * bucket.slot, dtype=torch.uint8, device=device)
            sent = torch.empty(bucket.slot, dtype=torch.uint8, device=device)
            mine = [piece for piece in bucket.pieces if piece.owner == bucket.group.rank]
            others = [piece for piece in bucket.pieces if piece.owner != bucket.group.rank]
            if mine:
                torch._foreach_copy_([_at(sent, p, 0) for p in mine], [p.weight for p in mine])
            dist.all_gather_into_tensor(received, sent, group=bucket.group.handle)
            if others:
                sources = [_at(received, p, p.owner * bucket.slot) for p in others]
                torch._foreach_copy_([p.weight for p in others], sources)


def _at(buffer: torch.Tensor, piece: _Piece, base: int) -> torch.Tensor:
    start = base + piece.offset
    return buffer[start : start + piece.weight.nbytes].view(piece.weight.dtype)
