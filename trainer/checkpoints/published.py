"""Published weights of a model in memory: saved from and loaded into any parallel layout.

The files are those of `trainer.checkpoints.format`. The same weights always give the same bytes: no time,
host, path or layout is written. Nothing is pickled.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, is_main_replica
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from trainer.checkpoints.format import (
    CONFIG_NAME,
    INDEX_NAME,
    SCHEMA,
    SHARD_BYTES,
    PublishedError,
    plan_shards,
    shard_name,
    write_config,
    write_index,
)
from trainer.contract.differences import differences
from trainer.contract.geometry import geometry
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError, parse, plain

_DTYPES = {
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.float64: "F64",
    torch.int64: "I64",
}


@dataclass(frozen=True)
class _Piece:
    """One rank's part of a full tensor."""

    rank: int
    offset: tuple[int, ...]
    shape: tuple[int, ...]


@dataclass(frozen=True)
class _Whole:
    """A full tensor and who holds which part of it."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    pieces: tuple[_Piece, ...]

    @property
    def bytes(self) -> int:
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


def sharded_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return parameters and persistent buffers as Megatron sharded tensors over their live storage.

    Args:
        model: A Megatron module, built under an initialised parallel state.
    """
    metadata = {"dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)}
    state: dict[str, Any] = cast(Any, model).sharded_state_dict(metadata=metadata)
    return {name: value for name, value in state.items() if not name.endswith("_extra_state")}


def _by_name(model: nn.Module) -> dict[str, ShardedTensor]:
    found: dict[str, ShardedTensor] = {}
    for value in nested_values(sharded_state_dict(model)):
        if isinstance(value, ShardedTensor):
            if value.key in found:
                raise PublishedError(f"two tensors of the model are called {value.key}")
            found[value.key] = value
    return found


def save_published(
    model: nn.Module, architecture: Architecture, directory: Path, *, shard_bytes: int = SHARD_BYTES
) -> list[str]:
    """Write the full weights of a model that may be spread over tensor- and expert-parallel ranks.

    Collective: every rank calls it. Tensors travel to rank 0 one at a time and rank 0 writes.

    Args:
        model: The model.
        architecture: What it was built from; written into `config.json`.
        directory: Directory to fill; created, must be empty.
        shard_bytes: Upper bound of a shard's size.

    Returns:
        Names of the files written, sorted (on rank 0; empty elsewhere).

    Raises:
        PublishedError: The directory holds something already.
    """
    local = _by_name(model)
    wholes = _gather_layout(local)
    shards = plan_shards({name: whole.bytes for name, whole in wholes.items()}, shard_bytes)
    leads = dist.get_rank() == 0
    if leads:
        directory.mkdir(parents=True, exist_ok=True)
        if any(directory.iterdir()):
            raise PublishedError(f"{directory} is not empty: published weights are never written over")
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards, start=1):
        file_name = shard_name(number, len(shards))
        tensors = {name: _collect(name, wholes[name], local.get(name)) for name in names}
        weight_map.update(dict.fromkeys(names, file_name))
        if leads:
            save_file(
                cast("dict[str, torch.Tensor]", tensors), directory / file_name, metadata={"format": "pt"}
            )
    if not leads:
        return []
    write_index(directory, weight_map, sum(whole.bytes for whole in wholes.values()))
    write_config(
        directory,
        architecture,
        dtype=str(next(p for p in model.parameters() if not getattr(p, "keep_fp32", False)).dtype)[6:],
        parameters=sum(p.numel() for p in _full_parameters(model, wholes)),
        tensors=len(wholes),
    )
    return sorted(path.name for path in directory.iterdir())


def _full_parameters(model: nn.Module, wholes: Mapping[str, _Whole]) -> Iterator[torch.Tensor]:
    names = {name for name, _ in model.named_parameters()}
    for name, whole in wholes.items():
        if name in names:
            yield torch.empty(whole.shape, dtype=whole.dtype, device="meta")


def _gather_layout(local: Mapping[str, ShardedTensor]) -> dict[str, _Whole]:
    """Who holds what, the same on every rank; replicas beyond the main one are left out."""
    rank, world = dist.get_rank(), dist.get_world_size()
    mine = {
        name: (tuple(t.global_shape), t.dtype, _Piece(rank, tuple(t.global_offset), tuple(t.local_shape)))
        for name, t in local.items()
        if is_main_replica(t.replica_id)
    }
    everyone: list[Any] = [None] * world
    dist.all_gather_object(everyone, mine)
    wholes: dict[str, _Whole] = {}
    for name in sorted({name for part in everyone for name in part}):
        found = [part[name] for part in everyone if name in part]
        shape, dtype = found[0][:2]
        wholes[name] = _Whole(shape, dtype, tuple(piece for _, _, piece in found))
    return wholes


def _collect(name: str, whole: _Whole, mine: ShardedTensor | None) -> torch.Tensor | None:
    """Bring one full tensor to rank 0, on the CPU; the other ranks send their part and get None."""
    rank = dist.get_rank()
    full = torch.empty(whole.shape, dtype=whole.dtype) if rank == 0 else None
    for piece in whole.pieces:
        if piece.rank == rank:
            assert mine is not None
            assert mine.data is not None
            part = mine.data.detach().reshape(piece.shape).cpu().contiguous()
        elif rank == 0:
            part = torch.empty(piece.shape, dtype=whole.dtype)
        else:
            continue
        if piece.rank != 0:
            if rank == 0:
                dist.recv(part, src=piece.rank)
            else:
                dist.send(part, dst=0)
        if full is not None:
            full[_region(piece.offset, piece.shape)] = part
    return full


def _region(offset: tuple[int, ...], shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(start, start + size) for start, size in zip(offset, shape, strict=True))


def read_config(directory: Path) -> dict[str, Any]:
    """Read and check `config.json` of a published checkpoint.

    Raises:
        PublishedError: The file is missing, unreadable, or of another schema.
    """
    path = directory / CONFIG_NAME
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise PublishedError(
            f"{directory} holds no {CONFIG_NAME}: it is not a published checkpoint"
        ) from None
    except (ValueError, RecursionError) as error:
        raise PublishedError(f"{path} is not JSON: {error}") from error
    if not isinstance(config, dict) or config.get("schema") != SCHEMA:
        found = config.get("schema") if isinstance(config, dict) else type(config).__name__
        raise PublishedError(f"{path}: schema {found!r} found, {SCHEMA!r} expected")
    return config


def read_architecture(directory: Path) -> Architecture:
    """Return the architecture a published checkpoint was built from.

    Raises:
        PublishedError: See `read_config`; or what it holds is no architecture.
    """
    try:
        return parse(Architecture, read_config(directory).get("architecture"), origin="architecture")
    except ConfigError as error:
        raise PublishedError(f"{directory / CONFIG_NAME}: {error}") from None


def load_published(
    model: nn.Module, directory: Path, *, architecture: Architecture | None = None, cast_dtype: bool = False
) -> None:
    """Fill a model from published weights; each rank reads only the slices it holds.

    Args:
        model: The model to fill, in any tensor- and expert-parallel layout.
        directory: The published checkpoint.
        architecture: When given, must be of the geometry in `config.json`; fusions are none of it.
        cast_dtype: Accepts another floating-point type and casts (evaluating bf16 weights in fp32);
            otherwise types must be equal.

    Raises:
        PublishedError: Architecture, names, a shape or a dtype differ, or a file is missing or cut off.
            Nothing was copied then.
    """
    if architecture is not None:
        _compare_architectures(architecture, read_architecture(directory), directory)
    files = _open_index(directory)
    local = _by_name(model)
    expected = set().union(*_all_names(local))
    missing, extra = sorted(expected - set(files)), sorted(set(files) - expected)
    if missing or extra:
        raise PublishedError(
            f"{directory} does not fit the model: {len(missing)} tensors missing {missing[:4]}, "
            f"{len(extra)} unknown to the model {extra[:4]}"
        )
    with ExitStack() as stack:
        handles = {
            file: stack.enter_context(_opened(directory / file)) for file in sorted(set(files.values()))
        }
        for copying in (False, True):  # all is checked before anything changes
            for name, target in local.items():
                view = handles[files[name]].get_slice(name)
                shape, dtype = tuple(view.get_shape()), view.get_dtype()
                if shape != tuple(target.global_shape):
                    raise PublishedError(
                        f"{name}: shape {list(target.global_shape)} expected, {list(shape)} found"
                    )
                if dtype != _DTYPES[target.dtype] and not cast_dtype:
                    raise PublishedError(
                        f"{name}: dtype {_DTYPES[target.dtype]} expected, {dtype} found in {directory}"
                    )
                if copying:
                    region = _region(tuple(target.global_offset), tuple(target.local_shape))
                    values = view[region] if region else handles[files[name]].get_tensor(name)
                    assert target.data is not None
                    with torch.no_grad():
                        target.data.copy_(values.reshape(target.data.shape))


def _all_names(local: Mapping[str, ShardedTensor]) -> list[set[str]]:
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, sorted(local))
    return [set(names) for names in everyone]


def _open_index(directory: Path) -> dict[str, str]:
    path = directory / INDEX_NAME
    try:
        files: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
    except FileNotFoundError:
        raise PublishedError(f"{directory} holds no {INDEX_NAME}: it is not a published checkpoint") from None
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise PublishedError(f"{path} is no index of weights ({error!r}); restore it") from error
    if not isinstance(files, dict) or not all(isinstance(file, str) for file in files.values()):
        raise PublishedError(f"{path} is no index of weights (weight_map names no files); restore it")
    for file in sorted(set(files.values())):
        if Path(file).name != file or not (directory / file).is_file():
            raise PublishedError(f"{path} names {file}, which is not a file in that directory")
    return files


def _opened(path: Path) -> Any:
    try:
        return safe_open(path, framework="pt")  # compares the header with the file's length
    except (SafetensorError, OSError) as error:
        raise PublishedError(
            f"{path} is cut off or damaged: {path.stat().st_size} bytes, no whole safetensors file "
            f"({error}); restore it"
        ) from error


def _compare_architectures(asked: Architecture, found: Architecture, directory: Path) -> None:
    wrong = differences(plain(geometry(found)), plain(geometry(asked)))
    if wrong:
        shown = ", ".join(
            f"{key}: {was!r} stored, {ours!r} asked" for key, (was, ours) in list(wrong.items())[:6]
        )
        raise PublishedError(f"the architecture of {directory} is not the one asked for: {shown}")
