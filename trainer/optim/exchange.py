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
    """All-gathers weights in buckets of bytes, so that every backend moves every type bit for bit.

    An all-gather moves as many bytes for each rank as for the one with the most, so all ranks' slots are
    filled side by side: each rank's weights are one stream, cut into slots of equal size wherever a slot
    ends, be it within a tensor. What is moved beyond the weights is the difference between the owners alone.
    """

    def __init__(
        self,
        routed: Sequence[Routed],
        ownership: Ownership,
        topology: Topology,
        *,
        bucket_bytes: int = BUCKET_BYTES,
    ) -> None:
        """Lay out the buckets; the same on every rank of a group.

        Args:
            routed: All parameters.
            ownership: Who owns which rows.
            topology: Process groups.
            bucket_bytes: Size of a bucket; the last one of a group is smaller.
        """
        self._buckets: list[_Bucket] = []
        for expert, group in ((False, topology.data), (True, topology.expert_data)):
            if group.size == 1:
                continue
            streams: list[list[torch.Tensor]] = [[] for _ in range(group.size)]
            for share in ownership.shares:
                if routed[share.unit].route.expert_parallel is expert:
                    rows = ownership.rows(share.unit, routed[share.unit].param.detach())
                    streams[share.owner].append(rows[share.start : share.stop].view(-1))
            self._buckets += _fill(group, streams, bucket_bytes)

    def run(self) -> None:
        """Bring every rank's weights up to date; collective."""
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


def _fill(group: Group, streams: Sequence[Sequence[torch.Tensor]], bucket_bytes: int) -> list[_Bucket]:
    """Cut the owners' flat weights into buckets.

    Args:
        group: The ranks.
        streams: Of each rank, the flat weights that it owns.
        bucket_bytes: Size of a bucket.
    """
    slot = max(bucket_bytes // group.size // ALIGN_BYTES, 1) * ALIGN_BYTES
    buckets: list[list[_Piece]] = []
    longest: list[int] = []
    for owner, stream in enumerate(streams):
        place = 0  # bytes into the owner's slots, end to end
        for weight in stream:
            start = 0
            while start < weight.numel():
                number, offset = divmod(place, slot)
                stop = min(weight.numel(), start + (slot - offset) // weight.itemsize)
                while len(buckets) <= number:
                    buckets.append([])
                    longest.append(0)
                piece = weight[start:stop]
                buckets[number].append(_Piece(piece, owner, offset))
                used = -(-piece.nbytes // ALIGN_BYTES) * ALIGN_BYTES
                longest[number] = max(longest[number], offset + used)
                place += used
                start = stop
    return [_Bucket(group, used, pieces) for used, pieces in zip(longest, buckets, strict=True)]


def _at(buffer: torch.Tensor, piece: _Piece, base: int) -> torch.Tensor:
    start = base + piece.offset
    return buffer[start : start + piece.weight.nbytes].view(piece.weight.dtype)
