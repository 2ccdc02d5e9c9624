"""Checkpoints of zeros, as sparse files: every tensor of an architecture, and no disk to speak of."""

import json
from math import prod
from pathlib import Path

from trainer.checkpoints.format import write_config
from trainer.contract.parameters import count_parameters
from trainer.contract.schema.architecture import Architecture
from vpmoe_assets.donors.audit import Stored, rung_tensors

_TORCH = {"fp32": "float32", "bf16": "bfloat16"}


def write_zeros(path: Path, tensors: Stored, note: str = "") -> None:
    """Write a safetensors file of zeros; the note makes equal tensors different bytes."""
    header: dict[str, object] = {"__metadata__": {"note": note}}
    offset = 0
    for name, (dtype, shape) in sorted(tensors.items()):
        end = offset + prod(shape) * (4 if dtype == "F32" else 2)
        header[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + offset)


def write_zero_rung(directory: Path, architecture: Architecture, dtype: str, note: str = "") -> None:
    """Fill a payload as a published rung."""
    directory.mkdir(parents=True, exist_ok=True)
    tensors = rung_tensors(architecture, dtype)
    write_zeros(directory / "model.safetensors", tensors, note)
    parameters = count_parameters(architecture).total
    write_config(directory, architecture, dtype=_TORCH[dtype], parameters=parameters, tensors=len(tensors))
