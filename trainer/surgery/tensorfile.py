"""safetensors files, one tensor at a time: read and written in place, so memory holds a tensor, not a file.

The library's own reader maps whole files into memory and its writer wants all tensors of a file at once; a
conversion of 12 GB has neither. The format is 8 bytes of header length, a JSON header padded with spaces to
8 bytes, and the tensors' bytes one after the other. The library validates the header of a file that is
opened.
"""

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from trainer.contract.safetensors_header import read_header

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I32": torch.int32,
    "F32": torch.float32,
    "F64": torch.float64,
    "I64": torch.int64,
}
"""Types by the format's names; a file stores its tensors in this order from the end, wide ones first."""

_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ORDER = {dtype: place for place, dtype in enumerate(DTYPES.values())}
_CALL_BYTES = 2**30
"""What one read or write moves at most; Linux stops at 2 GiB."""


class WeightsError(ValueError):
    """Weights are not what they should be; the message says what was expected and what was found."""


@dataclass(frozen=True)
class TensorSpec:
    """What is known of a tensor without its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def elements(self) -> int:
        """Number of values."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def nbytes(self) -> int:
        """Bytes of the values."""
        return self.elements * self.dtype.itemsize

    def __str__(self) -> str:
        return f"{_NAMES.get(self.dtype, self.dtype)} {list(self.shape)}"


def raw(tensor: torch.Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, not copied."""
    return memoryview(tensor.reshape(-1).view(torch.uint8).numpy())


class TensorFile:
    """One safetensors file, open for reading.

    Attributes:
        specs: Its tensors.
        metadata: The strings stored beside them.

    Raises:
        WeightsError: The file is missing, truncated or not in the format.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt"):  # checks header, offsets and the file's length
                pass
        except FileNotFoundError:
            raise WeightsError(f"{path}: no such file") from None
        except (SafetensorError, OSError) as error:
            raise WeightsError(
                f"{path}: not a whole safetensors file ({error}); {path.stat().st_size} bytes found"
            ) from error
        self._fd = os.open(path, os.O_RDONLY)
        header = read_header(path)
        self.metadata: dict[str, str] = header.metadata
        self.specs: dict[str, TensorSpec] = {}
        self._offsets: dict[str, int] = {}
        for name, entry in header.entries.items():
            if entry.dtype not in DTYPES:
                raise WeightsError(f"{path}: {name} has dtype {entry.dtype}; known are {', '.join(DTYPES)}")
            self.specs[name] = TensorSpec(entry.shape, DTYPES[entry.dtype])
            self._offsets[name] = entry.start

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """Return a tensor, or rows `start` to `stop` of it, as a new contiguous tensor in its stored type."""
        spec = self.specs[name]
        shape, offset = spec.shape, self._offsets[name]
        if spec.shape and (start, stop) != (0, None):
            rows = range(spec.shape[0])[start:stop]
            shape = (len(rows), *spec.shape[1:])
            offset += rows.start * TensorSpec(spec.shape[1:], spec.dtype).nbytes
        tensor = torch.empty(shape, dtype=spec.dtype)
        view = raw(tensor)
        done = 0
        while done < len(view):
            got = os.preadv(self._fd, [view[done : done + _CALL_BYTES]], offset + done)
            if got == 0:
                raise WeightsError(f"{self.path}: ended inside {name}; the file was cut while it was read")
            done += got
        return tensor

    def close(self) -> None:
        """Close the file."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class TensorFileWriter:
    """One safetensors file, filled one tensor at a time in any order; the bytes are those of the library.

    Room for all of it is taken at once, so a full disk is met at the start.

    Args:
        path: File to create; it must not exist.
        specs: All its tensors.
        metadata: Strings to store beside them.
    """

    def __init__(
        self, path: Path, specs: Mapping[str, TensorSpec], metadata: Mapping[str, str] | None = None
    ) -> None:
        self.path = path
        self.specs = dict(specs)
        self.digests: dict[str, str] = {}
        header: dict[str, Any] = {"__metadata__": dict(metadata or {"format": "pt"})}
        offset = 0
        for name in sorted(specs, key=lambda name: (-_ORDER[specs[name].dtype], name)):
            spec = specs[name]
            header[name] = {
                "dtype": _NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [offset, offset + spec.nbytes],
            }
            offset += spec.nbytes
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self._offsets = {
            name: start + entry["data_offsets"][0] for name, entry in header.items() if name != "__metadata__"
        }
        self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o644)
        try:
            os.posix_fallocate(self._fd, 0, start + offset)
            os.pwrite(self._fd, len(text).to_bytes(8, "little") + text, 0)
        except OSError as error:
            self.abandon()
            raise OSError(
                error.errno, f"{os.strerror(error.errno or 0)}: {start + offset} bytes needed", str(path)
            ) from error

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Store a tensor and its sha256.

        Raises:
            WeightsError: The file has no such tensor, has it already, or expects another shape or dtype.
        """
        found = TensorSpec(tuple(tensor.shape), tensor.dtype)
        if (spec := self.specs.get(name)) is None:
            raise WeightsError(f"{name}: {self.path.name} has no place for it")
        if name in self.digests:
            raise WeightsError(f"{name}: written twice into {self.path.name}")
        if found != spec:
            raise WeightsError(f"{name}: {spec} expected, {found} found")
        view = raw(tensor.detach().cpu().contiguous())
        self.digests[name] = hashlib.sha256(view).hexdigest()
        done = 0
        while done < len(view):
            done += os.pwrite(self._fd, view[done : done + _CALL_BYTES], self._offsets[name] + done)

    def finish(self) -> None:
        """Flush the file to the disk and close it.

        Raises:
            WeightsError: A tensor was not written.
        """
        if missing := sorted(self.specs.keys() - self.digests.keys()):
            raise WeightsError(f"{self.path.name}: {len(missing)} tensors were not written: {missing[:4]}")
        os.fsync(self._fd)
        self.abandon()

    def abandon(self) -> None:
        """Close the file as it is."""
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.abandon()
