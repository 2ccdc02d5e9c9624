"""Checkpoints read again: the tensors that their files hold, and those that are another checkpoint's bytes.

What has to be there follows from the recipe by the parameter tables of the contract, which the program that
wrote the files does not use.
"""

from collections.abc import Iterable, Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from trainer.contract.differences import differences
from trainer.contract.donor import donor_shapes
from trainer.contract.geometry import geometry
from trainer.contract.layers import moe_layers
from trainer.contract.parameters import count_parameters, parameters
from trainer.contract.safetensors_header import TensorEntry
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import ConfigError, parse, plain
from trainer.contract.schema.donor import Donor
from vpmoe_assets.donors.checkpoints import CONFIG_NAME, read_config, weight_files
from vpmoe_assets.donors.tensors import read_header
from vpmoe_assets.errors import DonorError

Stored = Mapping[str, tuple[str, tuple[int, ...]]]
"""Type, as the format writes it (`BF16`), and shape of each tensor."""

_TYPES = {"fp32": "F32", "bf16": "BF16"}
_CONFIG_TYPES = {"fp32": "float32", "bf16": "bfloat16"}
_CHUNK = 1 << 24
_SHOWN = 4


def rung_tensors(architecture: Architecture, dtype: str) -> Stored:
    """Return every tensor of a published rung.

    Args:
        architecture: Of the rung.
        dtype: `fp32` or `bf16`; what is fp32 in every model stays so.
    """
    stored = {
        parameter.name: ("F32" if parameter.float32 else _TYPES[dtype], parameter.shape)
        for parameter in parameters(architecture)
    }
    moe = architecture.moe
    if moe is not None and moe.router_enable_expert_bias:
        for number in moe_layers(architecture):
            stored[f"decoder.layers.{number - 1}.mlp.router.expert_bias"] = ("F32", (moe.num_experts,))
    return stored


def donor_tensors(donor: Donor, source: Path) -> Stored:
    """Return every tensor of a checkpoint made from the donor, of the types that the donor has them in.

    Args:
        donor: Geometry of the result.
        source: The donor's payload.

    Raises:
        DonorError: The donor cannot be read.
    """
    theirs = _Weights(source)
    return {name: (theirs.entry(name).dtype, shape) for name, shape in donor_shapes(donor).items()}


def tensor_faults(directory: Path, expected: Stored) -> list[str]:
    """Return where the weight files of a checkpoint are not exactly these tensors, byte after byte.

    Args:
        directory: The payload.
        expected: All of them.
    """
    try:
        files = weight_files(directory)
        headers = {path: read_header(path) for path in sorted(set(files.values()))}
    except DonorError as error:
        return [str(error)]
    faults = [
        f"{path.name} is in the directory and holds no tensor of the index"
        for path in sorted(set(directory.glob("*.safetensors")) - headers.keys())
    ]
    found = {name: entry for entries in headers.values() for name, entry in entries.items()}
    faults += _listed("missing", expected.keys() - found.keys())
    faults += _listed("not of this architecture", found.keys() - expected.keys())
    faults += [
        f"{name} is {found[name].dtype}{list(found[name].shape)}, expected {dtype}{list(shape)}"
        for name, (dtype, shape) in expected.items()
        if name in found and (found[name].dtype, found[name].shape) != (dtype, shape)
    ]
    for path, entries in headers.items():
        faults += _gaps(path, entries)
    return faults


def rung_config_faults(directory: Path, architecture: Architecture, dtype: str) -> list[str]:
    """Return where `config.json` of a published rung says something else than the recipe."""
    try:
        config = read_config(directory)
        stored = parse(Architecture, config.get("architecture"), origin=f"{CONFIG_NAME}: architecture")
    except (DonorError, ConfigError) as error:
        return [str(error)]
    asked: dict[str, Any] = {
        "architecture": plain(geometry(architecture)),
        "dtype": _CONFIG_TYPES[dtype],
        "parameters": count_parameters(architecture).total,
        "tensors": len(rung_tensors(architecture, dtype)),
    }
    found = {key: config.get(key) for key in asked} | {"architecture": plain(geometry(stored))}
    return [
        f"{CONFIG_NAME}: {key} is {theirs!r}, the recipe says {ours!r}"
        for key, (ours, theirs) in differences(asked, found).items()
    ]


def copy_faults(ours: Path, theirs: Path, pairs: Mapping[str, str]) -> list[str]:
    """Return the tensors that are not, number for number, those of another checkpoint.

    Args:
        ours: A checkpoint.
        theirs: Another one.
        pairs: Name of a tensor of theirs by the name of ours that must equal it. Where one is stored as F32
            and the other as BF16, theirs is rounded, or widened, as storing it does.
    """
    try:
        mine, other = _Weights(ours), _Weights(theirs)
        return [
            f"{name} is not {source} of {theirs.parent.name}"
            for name, source in pairs.items()
            if not mine.equals(name, other, source)
        ]
    except DonorError as error:
        return [str(error)]


def zero_faults(directory: Path, names: Iterable[str]) -> list[str]:
    """Return the tensors that are not zero throughout."""
    try:
        weights = _Weights(directory)
        return [f"{name} is not zero" for name in names if weights.any(name)]
    except DonorError as error:
        return [str(error)]


class _Weights:
    """Tensors of a checkpoint by name, mapped from their files."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._files = weight_files(directory)
        self._headers = {path: read_header(path) for path in set(self._files.values())}

    def equals(self, name: str, other: "_Weights", source: str) -> bool:
        mine, theirs = self.entry(name), other.entry(source)
        if mine.shape != theirs.shape:
            return False
        ours, others = self._numbers(name), other._numbers(source)
        parts = (slice(start, start + _CHUNK) for start in range(0, ours.size, _CHUNK))
        return all(
            np.array_equal(ours[part], _stored_as(mine.dtype, theirs.dtype, others[part])) for part in parts
        )

    def any(self, name: str) -> bool:
        numbers = self._numbers(name)
        return any(bool(numbers[start : start + _CHUNK].any()) for start in range(0, numbers.size, _CHUNK))

    def entry(self, name: str) -> TensorEntry:
        if name not in self._files:
            raise DonorError(f"{self._directory} has no tensor {name}")
        return self._headers[self._files[name]][name]

    def _numbers(self, name: str) -> "np.memmap[Any, np.dtype[np.unsignedinteger[Any]]]":
        """Bit patterns of a tensor, one integer a number."""
        entry = self.entry(name)
        width = {"F32": 4, "BF16": 2}.get(entry.dtype)
        if width is None:
            raise DonorError(f"{self._files[name]}: {name} is {entry.dtype}, neither F32 nor BF16")
        count = (entry.stop - entry.start) // width
        return np.memmap(self._files[name], f"<u{width}", "r", entry.start, (count,))


def _stored_as(dtype: str, source: str, bits: "np.ndarray[Any, Any]") -> "np.ndarray[Any, Any]":
    """Return the bit patterns of numbers stored as `source` when they are stored as `dtype`."""
    if dtype == source:
        return bits
    if dtype == "F32":
        return bits.astype(np.uint32) << np.uint32(16)
    wide = bits.astype(np.uint64)
    return ((wide + (0x7FFF + ((wide >> 16) & 1))) >> 16).astype(np.uint16)


def _gaps(path: Path, entries: Mapping[str, TensorEntry]) -> list[str]:
    """Return where the tensors of a file do not follow each other to its very end."""
    with path.open("rb") as stream:
        start = 8 + int.from_bytes(stream.read(8), "little")
    places = sorted((entry.start, entry.stop, name) for name, entry in entries.items())
    ends = [(start, start, "the header"), *places, (path.stat().st_size,) * 2 + ("the end of the file",)]
    return [
        f"{path.name}: {after} starts at byte {begin}, {before} ends at {stop}"
        for (_, stop, before), (begin, _, after) in pairwise(ends)
        if begin != stop
    ]


def _listed(what: str, names: Iterable[str]) -> list[str]:
    ordered = sorted(names)
    shown = ", ".join(ordered[:_SHOWN])
    return [f"{len(ordered)} tensors {what}: {shown}"] if ordered else []
