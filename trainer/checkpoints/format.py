"""The files of a published checkpoint, apart from its tensors. Free of torch and Megatron.

```
payload/
  config.json                          schema vpmoe.checkpoint/1: architecture, dtype, parameter count
  model-00001-of-00002.safetensors     full tensors named by Megatron parameter, however they were made
  model.safetensors.index.json         which tensor is in which shard
```
"""

from collections.abc import Mapping
from pathlib import Path

from trainer.contract.canonical import canonical_json
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import plain

SCHEMA = "vpmoe.checkpoint/1"
CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SHARD_BYTES = 2 * 2**30
"""Largest shard, unless one tensor alone is larger."""


class PublishedError(ValueError):
    """A published checkpoint does not hold what was asked of it."""


def plan_shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    """Put tensors into shards, in the order of their names.

    Args:
        sizes: Bytes of each tensor.
        limit: Largest shard, in bytes; a larger tensor has a shard of its own.
    """
    shards: list[list[str]] = [[]]
    size = 0
    for name in sorted(sizes):
        if shards[-1] and size + sizes[name] > limit:
            shards.append([])
            size = 0
        shards[-1].append(name)
        size += sizes[name]
    return shards


def shard_name(number: int, count: int) -> str:
    """File name of the shard with this 1-based number among `count`."""
    return f"model-{number:05d}-of-{count:05d}.safetensors"


def write_index(directory: Path, weight_map: Mapping[str, str], total_bytes: int) -> None:
    """Write which tensor is in which shard.

    Args:
        directory: The checkpoint.
        weight_map: File name of each tensor.
        total_bytes: Bytes of all tensors.
    """
    index = {"metadata": {"total_size": total_bytes}, "weight_map": dict(weight_map)}
    (directory / INDEX_NAME).write_text(canonical_json(index, indent=2) + "\n", encoding="utf-8")


def write_config(
    directory: Path, architecture: Architecture, *, dtype: str, parameters: int, tensors: int
) -> None:
    """Write what the tensors are the weights of.

    Args:
        directory: The checkpoint.
        architecture: What the model is built from.
        dtype: Storage type of the weights, by torch's name (`bfloat16`).
        parameters: Trainable parameters.
        tensors: Tensors stored, buffers included.
    """
    config = {
        "schema": SCHEMA,
        "architecture": plain(architecture),
        "dtype": dtype,
        "parameters": parameters,
        "tensors": tensors,
    }
    (directory / CONFIG_NAME).write_text(canonical_json(config, indent=2) + "\n", encoding="utf-8")
