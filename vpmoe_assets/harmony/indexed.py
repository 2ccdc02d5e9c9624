"""Megatron's IndexedDataset files (format: `trainer.contract.indexed`), as a stream and without torch."""

import hashlib
import os
from array import array
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
import numpy.typing as npt

from trainer.contract.indexed import DTYPES, HEADER_BYTES, pack_header, unpack_header
from vpmoe_assets.errors import DataError

_CODES = {np.dtype(name): code for code, name in DTYPES.items()}


@dataclass(frozen=True)
class WrittenFile:
    """Size in bytes and sha256 of a file, known while it was written."""

    bytes: int
    sha256: str


@dataclass(frozen=True)
class Index:
    """A parsed `.idx`: lengths [n] int32, byte offsets [n] int64, document indices [n+1] int64."""

    dtype: np.dtype[Any]
    lengths: npt.NDArray[np.int32]
    offsets: npt.NDArray[np.int64]
    documents: npt.NDArray[np.int64]

    @property
    def elements(self) -> int:
        """Number of elements (tokens) in the `.bin`."""
        return int(self.lengths.sum(dtype=np.int64))


class IndexedWriter:
    """Writes one `.bin`/`.idx` pair; of everything written it keeps 4 bytes per sequence in memory.

    Use as a context manager; `finish` writes the index. Leaving without `finish` removes both files.

    Args:
        prefix: Path without suffix.
        dtype: uint8 or int32.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike) -> None:
        self.dtype = np.dtype(dtype)
        if self.dtype not in _CODES:
            raise ValueError(f"IndexedDataset files here hold uint8 or int32, not {self.dtype}")
        self.bin_path, self.idx_path = (
            prefix.with_name(prefix.name + ".bin"),
            prefix.with_name(prefix.name + ".idx"),
        )
        self._lengths = array("i")
        self._bytes = 0
        self._digest = hashlib.sha256()
        # A new file, not the old one emptied: a dying worker may still hold that one open.
        self.bin_path.unlink(missing_ok=True)
        self.idx_path.unlink(missing_ok=True)
        self._stream: BinaryIO | None = self.bin_path.open("xb")
        self._finished = False

    def append(self, data: "bytes | npt.NDArray[Any]", lengths: Sequence[int]) -> None:
        """Add `len(lengths)` sequences whose concatenation is `data`.

        Raises:
            ValueError: The lengths do not add up to the data.
        """
        view = memoryview(data).cast("B") if len(data) else memoryview(b"")
        if view.nbytes != sum(lengths) * self.dtype.itemsize:
            raise ValueError(
                f"{self.bin_path.name}: {view.nbytes} bytes for {sum(lengths)} elements of {self.dtype}"
            )
        if self._stream is None:
            raise ValueError(f"{self.bin_path.name} is closed")
        self._stream.write(view)
        self._digest.update(view)
        self._bytes += view.nbytes
        self._lengths.extend(lengths)

    def finish(self) -> tuple[WrittenFile, WrittenFile]:
        """Close the `.bin` and write the `.idx`; returns what was written (bin, idx)."""
        if self._stream is None:
            raise ValueError(f"{self.bin_path.name} is closed")
        self._stream.flush()
        if hasattr(os, "posix_fadvise"):  # not on macOS
            # Starts the way to the disk now, beside the next shard's work: publishing has less to wait for.
            os.posix_fadvise(self._stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        self._stream.close()
        self._stream = None
        lengths = np.frombuffer(self._lengths, dtype=np.int32) if self._lengths else np.zeros(0, np.int32)
        count = lengths.size
        digest, size = hashlib.sha256(), 0
        with self.idx_path.open("wb") as stream:
            for part in (
                pack_header(_CODES[self.dtype], count),
                lengths.astype("<i4", copy=False).tobytes(),
                _offsets(lengths, self.dtype.itemsize).tobytes(),
                np.arange(count + 1, dtype="<i8").tobytes(),
            ):
                stream.write(part)
                digest.update(part)
                size += len(part)
        self._finished = True
        return WrittenFile(self._bytes, self._digest.hexdigest()), WrittenFile(size, digest.hexdigest())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._stream is not None:
            self._stream.close()
            self._stream = None
        if not self._finished:
            self.bin_path.unlink(missing_ok=True)
            self.idx_path.unlink(missing_ok=True)


def read_index(path: Path) -> Index:
    """Parse and check an `.idx` file.

    Raises:
        DataError: Not such a file, a size that does not fit the counts, or offsets or documents that are not
            those of one sequence per document.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise DataError(f"cannot read the index {path}: {error.strerror}") from error
    if len(content) < HEADER_BYTES:
        raise DataError(f"{path} is not an IndexedDataset index: only {len(content)} bytes")
    header = unpack_header(content)
    if not header.known or header.code not in DTYPES:
        raise DataError(
            f"{path} is not an IndexedDataset index of uint8 or int32 (version {header.version}, dtype "
            f"{header.code})"
        )
    count = header.sequences
    if header.documents != count + 1 or len(content) != header.file_bytes:
        raise DataError(
            f"{path} is damaged: {len(content)} bytes, {header.documents} document indices for {count} "
            f"sequences, expected {header.file_bytes} bytes and {count + 1}"
        )
    lengths = np.frombuffer(content, "<i4", count, HEADER_BYTES)
    offsets = np.frombuffer(content, "<i8", count, HEADER_BYTES + 4 * count)
    indices = np.frombuffer(content, "<i8", count + 1, HEADER_BYTES + 12 * count)
    dtype = np.dtype(DTYPES[header.code])
    if (lengths < 0).any():
        raise DataError(
            f"{path} is damaged: document {int(np.argmax(lengths < 0))} has {int(lengths.min())} elements"
        )
    if not np.array_equal(offsets, _offsets(lengths, dtype.itemsize)):
        raise DataError(f"{path} is damaged: its byte offsets do not follow from its lengths")
    if not np.array_equal(indices, np.arange(count + 1)):
        raise DataError(f"{path}: a document is not exactly one sequence")
    return Index(dtype, lengths, offsets, indices)


def map_elements(prefix: Path, index: Index) -> npt.NDArray[Any]:
    """Memory-map the `.bin` beside an index.

    Raises:
        DataError: The file is absent or has another size than the index says.
    """
    path = prefix.with_name(prefix.name + ".bin")
    expected = index.elements * index.dtype.itemsize
    found = path.stat().st_size if path.is_file() else None
    if found != expected:
        raise DataError(
            f"{path}: {found} bytes, its index says {expected}; the shard is damaged, build it again"
        )
    return np.memmap(path, dtype=index.dtype, mode="r") if expected else np.zeros(0, index.dtype)


def _offsets(lengths: npt.NDArray[np.int32], itemsize: int) -> npt.NDArray[np.int64]:
    offsets = np.zeros(lengths.size, dtype="<i8")
    if lengths.size:
        np.cumsum(lengths[:-1], dtype=np.int64, out=offsets[1:])
    return offsets * itemsize
