"""Columns of numbers as bytes: one zstandard frame each, so that each has statistics of its own."""

import struct

import numpy as np
import zstandard
from numpy.typing import NDArray

from trainer.contract.topk.errors import StoreError

_PARAMETERS = zstandard.ZstdCompressionParameters(
    strategy=zstandard.STRATEGY_FAST,
    window_log=17,
    hash_log=6,
    min_match=7,
    write_content_size=True,
    write_checksum=False,
)
"""Columns are noise of a skewed distribution, so Huffman's code is all that there is to gain. The matches
that any level looks for are accidents: with next to none, frames are smaller and decode faster."""
_SIZE = struct.Struct("<I")


class ColumnWriter:
    """Columns behind one another, each as its compressed size and a zstandard frame."""

    def __init__(self) -> None:
        self._compressor = zstandard.ZstdCompressor(compression_params=_PARAMETERS)
        self._parts: list[bytes] = []

    def add(self, column: NDArray[np.uint8]) -> None:
        """Append a column of bytes; an empty one takes no frame."""
        content = self._compressor.compress(column.tobytes()) if column.size else b""
        self._parts.append(_SIZE.pack(len(content)) + content)

    def add_numbers(self, column: NDArray[np.integer]) -> None:
        """Append a column of numbers below 2^32, as planes of their bytes, the low ones first."""
        numbers = column.astype("<u4").reshape(-1, 1).view(np.uint8)
        for plane in range(4):
            self.add(numbers[:, plane] if numbers[:, plane:].any() else np.zeros(0, np.uint8))

    def content(self) -> bytes:
        """Return all columns."""
        return b"".join(self._parts)


class ColumnReader:
    """Reads what a `ColumnWriter` wrote, column by column, given how many numbers each must have."""

    def __init__(self, payload: memoryview):
        self._payload, self._at, self._number = payload, 0, 0
        self._decompressor = zstandard.ZstdDecompressor()

    def take(self, count: int, *, optional: bool = False) -> NDArray[np.uint8]:
        """Return the next column.

        Args:
            count: Its bytes.
            optional: An absent column is one of zeros.

        Raises:
            StoreError: If it has another size, or is no zstandard frame.
        """
        if len(self._payload) - self._at < _SIZE.size:
            raise StoreError(f"column {self._number} is missing")
        (size,) = _SIZE.unpack_from(self._payload, self._at)
        content = self._payload[self._at + _SIZE.size : self._at + _SIZE.size + size]
        self._at += _SIZE.size + size
        self._number += 1
        if not size:
            if count and not optional:
                raise StoreError(f"column {self._number - 1} is empty, expected {count} bytes")
            return np.zeros(count, np.uint8)
        try:
            # What a frame says of its size is what is allocated for it, so that is looked at first.
            if len(content) != size or zstandard.get_frame_parameters(content).content_size != count:
                raise StoreError(f"column {self._number - 1} does not have its {count} bytes")
            return np.frombuffer(self._decompressor.decompress(content), np.uint8)
        except zstandard.ZstdError as error:
            raise StoreError(f"column {self._number - 1}: {error}") from error

    def take_numbers(self, count: int) -> NDArray[np.int64]:
        """Return the next column of numbers."""
        numbers = self.take(count, optional=True).astype(np.int64)
        for plane in range(1, 4):
            numbers |= self.take(count, optional=True).astype(np.int64) << 8 * plane
        return numbers

    def end(self) -> None:
        """Refuse bytes behind the last column.

        Raises:
            StoreError: If there are any.
        """
        if self._at != len(self._payload):
            raise StoreError(f"{len(self._payload) - self._at} bytes behind the last column")
