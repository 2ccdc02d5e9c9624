"""The records of some sequences as bytes: each column apart, behind zstandard."""

import struct

import numpy as np
import zstandard
from numpy.typing import NDArray

from trainer.contract.topk.errors import StoreError
from trainer.contract.topk.records import TopKRecords

_LEVEL = 3
_SIZES = struct.Struct("<I")
MOST_CELLS = 1 << 25
"""Most ids of a block; bounds what a reader allocates."""


def pack_columns(columns: list[bytes]) -> bytes:
    """Compress each column by itself and put them behind one another."""
    compressor = zstandard.ZstdCompressor(level=_LEVEL, write_checksum=False)
    parts = [compressor.compress(column) for column in columns]
    return b"".join([_SIZES.pack(len(part)) + part for part in parts])


def unpack_columns(payload: memoryview, sizes: list[int]) -> list[bytes]:
    """Undo `pack_columns`, given the bytes that each column must have.

    Raises:
        StoreError: If one has another size or is no zstandard frame.
    """
    columns, at = [], 0
    decompressor = zstandard.ZstdDecompressor()
    for number, size in enumerate(sizes):
        if len(payload) - at < _SIZES.size:
            raise StoreError(f"column {number} is missing")
        (length,) = _SIZES.unpack_from(payload, at)
        part = payload[at + _SIZES.size : at + _SIZES.size + length]
        at += _SIZES.size + length
        try:
            # The size that a frame claims decides what is allocated for it, so it is looked at first.
            if len(part) != length or zstandard.get_frame_parameters(part).content_size != size:
                raise StoreError(f"column {number} does not have its {size} bytes")
            columns.append(decompressor.decompress(part))
        except zstandard.ZstdError as error:
            raise StoreError(f"column {number}: {error}") from error
    if at != len(payload):
        raise StoreError(f"{len(payload) - at} bytes behind the last column")
    return columns


def _columns(n: int, topk: int, draws: int) -> list[tuple[str, tuple[int, ...]]]:
    return [("<f4", (n,)), ("<i4", (n, topk)), ("<f4", (n, topk)), ("<f4", (n,)), ("<i4", (n, draws))]


def encode(records: TopKRecords) -> bytes:
    """Return records as bytes."""
    arrays = (records.label_logprob, records.ids, records.logprobs, records.tail_mass, records.draws)
    return pack_columns([np.ascontiguousarray(array).tobytes() for array in arrays])


def decode(payload: memoryview, tokens: int, topk: int, tail_draws: int) -> TopKRecords:
    """Return the records of a block.

    Raises:
        StoreError: If the bytes are no block of so many tokens.
    """
    if tokens * topk > MOST_CELLS:
        raise StoreError(f"{tokens} tokens of {topk} ids are more than a block has")
    shapes = _columns(tokens, topk, tail_draws)
    sizes = [int(np.prod(shape)) * 4 for _, shape in shapes]
    arrays: list[NDArray] = [
        np.frombuffer(column, dtype).reshape(shape)
        for column, (dtype, shape) in zip(unpack_columns(payload, sizes), shapes, strict=True)
    ]
    return TopKRecords(*arrays)
