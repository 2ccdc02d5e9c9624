"""Optimizer state as Megatron sharded tensors: global shapes do not depend on the number of ranks."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor

from trainer.errors import OptimizerError, OptimizerStateError
from trainer.optim.low_halves import belongs
from trainer.optim.parts import Part
from trainer.optim.routing import Routed
from trainer.optim.topology import Topology

SCHEMA = "vpmoe.optimizer/1"
MASTER = "master_weight"


def state_tensors(part: Part) -> Iterator[tuple[str, torch.Tensor]]:
    """Return what a checkpoint keeps of one part.

    A float32 parameter is its own master weight and is kept with the model. A master weight of which the low
    half is kept is put together in the host's memory, one part after another: a GPU that is nearly full has
    no room for it, and a checkpoint is the same however it is kept.
    """
    if part.keeps_master:
        yield MASTER, part.read_master().cpu() if part.low_half else part.master
    yield from part.state.items()


def shard_state(
    parts: Sequence[Part],
    routed: Sequence[Routed],
    model_state: Mapping[str, Any],
    topology: Topology,
    *,
    replicated: bool,
) -> dict[str, ShardedTensor]:
    """Describe this rank's state tensors by where they lie in the whole model's.

    Args:
        parts: This rank's parts.
        routed: All parameters.
        model_state: `model.sharded_state_dict()`: where each local parameter lies in the whole model.
        topology: Process groups.
        replicated: Every data-parallel rank holds all of it, so only the first is to write.

    Returns:
        One sharded tensor for each state tensor, by `<parameter>.<state>`; data are the live tensors.

    Raises:
        OptimizerStateError: A parameter is missing from `model_state`.
    """
    places = {
        _address(entry.data): entry for entry in _sharded_tensors(model_state) if entry.data is not None
    }
    tensors = {}
    for part in parts:
        param = routed[part.index].param
        place = places.get(_address(param))
        if place is None or tuple(place.local_shape) != tuple(param.shape):
            raise OptimizerStateError(
                f"{part.name} {list(param.shape)}: the model's sharded state dict does not contain it as "
                "one sharded "
                f"tensor, so its optimizer state cannot be placed in a checkpoint."
            )
        group = topology.expert_data if part.route.expert_parallel else topology.data
        for kind, tensor in state_tensors(part):
            replica = _replica(param, kind, topology)
            sharded = _place(part, kind, tensor, place, (replica, group.rank if replicated else 0))
            tensors[f"{part.name}.{kind}"] = sharded
    return tensors


def _replica(param: torch.nn.Parameter, kind: str, topology: Topology) -> int:
    """Place among the tensor-parallel ranks that hold the very same numbers."""
    if not getattr(param, "allreduce", True):
        return 0  # the expert-data-parallel group spans the tensor-parallel ranks
    if not getattr(param, "tensor_model_parallel", False):
        return topology.tensor.rank
    whole_rows = kind == "second_momentum_buffer" and getattr(param, "partition_dim", -1) == param.ndim - 1
    return topology.tensor.rank if whole_rows else 0


def _place(
    part: Part, kind: str, tensor: torch.Tensor, place: ShardedTensor, replica_id: tuple[int, int]
) -> ShardedTensor:
    shape = list(place.global_shape)
    offset = list(place.global_offset)
    grid = None if place.axis_fragmentations is None else list(place.axis_fragmentations)
    if tensor.ndim and tensor.size(0) != place.local_shape[0]:
        offset[place.prepend_axis_num] += part.start
        grid = None  # ranges of rows need not be equal
    if kind == "second_momentum_buffer":
        shape[-1], offset[-1] = 1, 0
        if grid is not None:
            grid[-1] = 1
    return ShardedTensor(
        key=f"optimizer.{kind}.{place.key}",
        data=tensor,
        dtype=tensor.dtype,
        local_shape=tuple(tensor.shape),
        global_shape=tuple(shape),
        global_offset=tuple(offset),
        axis_fragmentations=None if grid is None else tuple(grid),
        replica_id=replica_id,
        prepend_axis_num=place.prepend_axis_num,
    )


def load_tensors(parts: Sequence[Part], loaded: Mapping[str, Any]) -> None:
    """Copy loaded state into the live state tensors.

    Args:
        parts: This rank's parts.
        loaded: What came back for the dictionary of `shard_state`.

    Raises:
        OptimizerStateError: A tensor is missing or unknown, or has another shape or type; nothing is copied
            then.
        OptimizerError: The model's weights are not those of the master weights.
    """
    wanted = {f"{part.name}.{kind}": form for part in parts for kind, form in _forms(part)}
    missing, unknown = sorted(wanted.keys() - loaded.keys()), sorted(loaded.keys() - wanted.keys())
    if missing or unknown:
        raise OptimizerStateError(
            f"optimizer state does not fit the model: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unknown)} unknown {unknown[:3]}. Resume with the configuration that made the checkpoint."
        )
    for name, (dtype, shape) in wanted.items():
        found = loaded[name]
        if not isinstance(found, torch.Tensor):
            raise OptimizerStateError(
                f"optimizer state {name}: expected a tensor, found {type(found).__name__}."
            )
        if found.shape != shape or found.dtype != dtype:
            raise OptimizerStateError(
                f"optimizer state {name}: expected {dtype} {list(shape)}, "
                f"found {found.dtype} {list(found.shape)}."
            )
    for part in parts:
        if part.keeps_master:
            _load_master(part, loaded[f"{part.name}.{MASTER}"])
        for kind, tensor in part.state.items():
            tensor.copy_(loaded[f"{part.name}.{kind}"])


def _forms(part: Part) -> Iterator[tuple[str, tuple[torch.dtype, torch.Size]]]:
    """Return type and shape of what `state_tensors` keeps."""
    if part.keeps_master:
        yield MASTER, (torch.float32, part.weight.shape)
    for kind, tensor in part.state.items():
        yield kind, (tensor.dtype, tensor.shape)


def _load_master(part: Part, master: torch.Tensor) -> None:
    master = master.to(part.weight.device)
    if not belongs(part.weight, master):
        raise OptimizerError(
            f"{part.name}: the weights that were loaded into the model do not belong to the master weights "
            "of this optimizer state; load both from one checkpoint."
        )
    part.write_master(master)


def _address(tensor: torch.Tensor) -> tuple[int, torch.Size]:
    return tensor.data_ptr(), tensor.shape


def _sharded_tensors(tree: object) -> Iterator[ShardedTensor]:
    if isinstance(tree, ShardedTensor):
        yield tree
    elif isinstance(tree, Mapping):
        for value in tree.values():
            yield from _sharded_tensors(value)
    elif isinstance(tree, list | tuple):
        for value in tree:
            yield from _sharded_tensors(value)
