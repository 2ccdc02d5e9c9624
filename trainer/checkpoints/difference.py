"""How far live tensors are from those of a resume checkpoint, one stored piece in memory at a time."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, ReadItem
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from trainer.checkpoints.plain_metadata import require_plain_metadata
from trainer.checkpoints.resume import CheckpointError
from trainer.job.distributed import together

_SLICE = 1 << 24
"""Elements that are subtracted in float64 at once."""


def largest_difference(tensors: Mapping[str, ShardedTensor], directory: Path) -> float:
    """Largest absolute difference between local tensors and the same tensors of a checkpoint, over all ranks.

    Collective. Each rank reads what it holds, piece by piece as the files have it, and keeps no more than one
    piece (at full size 0.8 GB, the fp32 embedding): a second model is never in memory. The reading is torch's
    own, without the exchange of plans that a load has, so ranks may hold different numbers of tensors.

    Args:
        tensors: Flat mapping of any key to Megatron `ShardedTensor`s with data.
        directory: A complete checkpoint.

    Returns:
        0.0 when all are equal bit for bit (NaN never is); infinity where one side is not finite.

    Raises:
        CheckpointError: The checkpoint lacks a tensor or a part of one, or has it in another shape or type,
            or cannot be read.
    """
    worst = together(lambda: _largest_here(list(tensors.values()), directory), only_leader=False)
    reduced = torch.tensor([worst], dtype=torch.float64)
    dist.all_reduce(reduced, op=dist.ReduceOp.MAX)
    return float(reduced.item())


def _largest_here(tensors: list[ShardedTensor], directory: Path) -> float:
    reader = FileSystemReader(directory)
    try:
        require_plain_metadata(directory)
        metadata = reader.read_metadata()
        reader.set_up_storage_reader(metadata, is_coordinator=True)
        comparison = _Comparison(tensors)
        items = [item for tensor in tensors for item in _reads(tensor, metadata, directory)]
        reader.read_data(LoadPlan(items), comparison)
    except CheckpointError:
        raise
    except Exception as error:  # of torch's reader, the unpickler or the disk
        raise CheckpointError(f"{directory} could not be read: {type(error).__name__}: {error}") from error
    comparison.require_all(directory)
    return comparison.worst


def _reads(tensor: ShardedTensor, metadata: Metadata, directory: Path) -> list[ReadItem]:
    """Where the pieces of one local tensor lie in the files."""
    stored = metadata.state_dict_metadata.get(tensor.key)
    if not isinstance(stored, TensorStorageMetadata):
        raise CheckpointError(f"{directory} lacks {tensor.key}")
    ours = (tuple(tensor.global_shape), tensor.dtype)
    theirs = (tuple(stored.size), stored.properties.dtype)
    if ours != theirs:
        raise CheckpointError(f"{directory}: {tensor.key} is {theirs}, the run has {ours}")
    chunk = ChunkStorageMetadata(torch.Size(tensor.global_offset), torch.Size(tensor.local_shape))
    return create_read_items_for_chunk_list(tensor.key, stored, [chunk])


class _Comparison(DefaultLoadPlanner):
    """Takes what the reader hands over as a load would, and compares it instead of keeping it."""

    def __init__(self, tensors: list[ShardedTensor]) -> None:
        super().__init__()
        self.worst = 0.0
        self._live = {(tensor.key, tuple(tensor.global_offset)): tensor for tensor in tensors}
        self._seen: Counter[tuple[str, tuple[int, ...]]] = Counter()

    def resolve_tensor(self, read_item: ReadItem) -> torch.Tensor:
        """Room for one piece, on the device of what it is compared with."""
        return torch.empty_like(self._region(read_item), memory_format=torch.contiguous_format)

    def commit_tensor(self, read_item: ReadItem, tensor: torch.Tensor) -> None:
        """Compare one piece."""
        live = self._region(read_item)
        self._seen[_key(read_item.dest_index)] += live.numel()
        if torch.equal(live, tensor):
            return
        for ours, theirs in zip(
            live.reshape(-1).split(_SLICE), tensor.reshape(-1).split(_SLICE), strict=True
        ):
            if not torch.equal(ours, theirs):
                apart = (ours.double() - theirs.double()).abs().max().item()
                # NaN compares false and ends as infinity too.
                self.worst = max(self.worst, apart if apart > 0 else float("inf"))

    def require_all(self, directory: Path) -> None:
        """Refuse a checkpoint that did not have every number of every tensor."""
        for key, tensor in self._live.items():
            assert tensor.data is not None
            if self._seen[key] != tensor.data.numel():
                raise CheckpointError(
                    f"{directory}: of {tensor.key} at {list(key[1])}, {self._seen[key]} of "
                    f"{tensor.data.numel()} numbers are there"
                )

    def _region(self, item: ReadItem) -> torch.Tensor:
        tensor = self._live[_key(item.dest_index)]
        assert tensor.data is not None
        part = tuple(
            slice(start, start + size) for start, size in zip(item.dest_offsets, item.lengths, strict=True)
        )
        return tensor.data.detach()[part]


def _key(index: MetadataIndex) -> tuple[str, tuple[int, ...]]:
    return index.fqn, tuple(index.offset or ())
