"""Safetensors files without torch: what is in one, a subset of one, and seeded tensors in bfloat16."""

import hashlib
import mmap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from trainer.contract.safetensors_header import HeaderError, TensorEntry
from trainer.contract.safetensors_header import read_header as read_whole_header
from vpmoe_assets.errors import DonorError

_SPEC_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file, checked against its size.

    Raises:
        DonorError: The file is absent, cut off, or no safetensors file.
    """
    try:
        return read_whole_header(path).entries
    except FileNotFoundError:
        raise DonorError(f"{path}: no such file; materialise or download the donor again") from None
    except HeaderError as error:
        raise DonorError(str(error)) from error


def require_tensors(
    found: Mapping[str, Sequence[int]], expected: Mapping[str, Sequence[int]], what: str
) -> None:
    """Refuse tensors that are not exactly the expected ones.

    Raises:
        DonorError: Naming the first missing, unknown and wrongly shaped tensors.
    """
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    wrong = [
        f"{name} is {list(found[name])}, expected {list(expected[name])}"
        for name in sorted(expected.keys() & found.keys())
        if tuple(found[name]) != tuple(expected[name])
    ]
    problems = [f"lacks {len(missing)} tensors ({', '.join(missing[:3])})"] * bool(missing)
    problems += [f"has {len(unknown)} unknown tensors ({', '.join(unknown[:3])})"] * bool(unknown)
    problems += [f"{len(wrong)} shapes differ ({'; '.join(wrong[:3])})"] * bool(wrong)
    if problems:
        raise DonorError(f"{what} {'; '.join(problems)}. It is not the architecture that the config states")


def copy_tensors(files: Mapping[str, Path], target: Path) -> dict[str, TensorEntry]:
    """Write some tensors of larger files into one file of their own, bytes unchanged.

    The source is mapped, not read: memory holds no whole shard.

    Args:
        files: Where each wanted tensor lies.
        target: File to write.

    Returns:
        The entries of the written file.

    Raises:
        DonorError: A tensor is not in its file.
    """
    from safetensors import TensorSpec, serialize_file

    specs, kept = {}, []
    for name, path in sorted(files.items()):
        entry = read_header(path).get(name)
        if entry is None or entry.dtype not in _SPEC_NAMES:
            raise DonorError(f"{path} holds no floating-point tensor {name}")
        with path.open("rb") as stream:
            mapped = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
        view = np.frombuffer(mapped, dtype=np.uint8)[entry.start : entry.stop]
        kept.append(view)
        specs[name] = TensorSpec(
            dtype=_SPEC_NAMES[entry.dtype], shape=entry.shape, data_ptr=view.ctypes.data, data_len=view.nbytes
        )
    serialize_file(specs, str(target), metadata={"format": "pt"})
    return read_header(target)


def save_bfloat16(tensors: Mapping[str, npt.NDArray[np.float32]], path: Path) -> None:
    """Write float32 tensors as bfloat16, rounded to nearest, ties to even."""
    from safetensors import TensorSpec, serialize_file

    rounded = {name: to_bfloat16(tensor) for name, tensor in tensors.items()}
    specs: dict[str, Any] = {
        name: TensorSpec(
            dtype="bfloat16", shape=value.shape, data_ptr=value.ctypes.data, data_len=value.nbytes
        )
        for name, value in rounded.items()
    }
    serialize_file(specs, str(path), metadata={"format": "pt"})


def to_bfloat16(values: npt.NDArray[np.float32]) -> npt.NDArray[np.uint16]:
    """Return the upper halves of finite float32 values, rounded to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    return ((bits + (np.uint32(0x7FFF) + ((bits >> 16) & 1))) >> 16).astype(np.uint16)


def seeded_normal(seed: int, name: str, shape: tuple[int, ...], std: float) -> npt.NDArray[np.float32]:
    """Return a seeded tensor of nearly normal values: mean 0, the given standard deviation.

    Each value is the centred sum of the four 16-bit fields of one raw Philox word. Only integer arithmetic
    and one multiplication are involved, so the bytes are the same with every NumPy and on every machine;
    `Generator.normal` promises neither.

    Args:
        seed: Of the experiment.
        name: Of the tensor; tensors are independent streams, in whatever order they are made.
        shape: Of the tensor.
        std: Standard deviation.
    """
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()[:16]
    count = int(np.prod(shape, dtype=np.int64))
    words = np.random.Philox(key=np.frombuffer(key, dtype="<u8").astype(np.uint64)).random_raw(count)
    fields = np.asarray(words, dtype="<u8").view("<u2").reshape(count, 4)
    centred = fields.sum(axis=1, dtype=np.int32) - np.int32(2 * 65535)
    # Variance of a uniform 16-bit integer is (2^32 - 1) / 12; of the sum of four, a third of 2^32 - 1.
    return (centred.astype(np.float32) * np.float32(std / ((2**32 - 1) / 3) ** 0.5)).reshape(shape)


def read_float32(path: Path, name: str) -> npt.NDArray[np.float32]:
    """One tensor of a file as float32.

    Raises:
        DonorError: The file is unusable, has no such tensor, or it is neither F32 nor BF16.
    """
    entry = read_header(path).get(name)
    if entry is None or entry.dtype not in ("F32", "BF16"):
        raise DonorError(f"{path} holds no F32 or BF16 tensor {name}")
    with path.open("rb") as stream:
        stream.seek(entry.start)
        content = stream.read(entry.stop - entry.start)
    if entry.dtype == "F32":
        return np.frombuffer(content, dtype="<f4").reshape(entry.shape).astype(np.float32)
    halves = np.frombuffer(content, dtype="<u2").astype(np.uint32)
    return (halves << 16).view(np.float32).reshape(entry.shape)
