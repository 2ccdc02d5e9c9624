"""The header of a safetensors file: 8 bytes of length, JSON padded with spaces to 8 bytes, then tensors."""

from dataclasses import dataclass
from math import prod
from operator import index
from pathlib import Path
from typing import Any

from trainer.contract.json_text import parse_json

ITEM_BYTES = {
    "F64": 8,
    "F32": 4,
    "F16": 2,
    "BF16": 2,
    "I64": 8,
    "I32": 4,
    "I16": 2,
    "I8": 1,
    "U8": 1,
    "BOOL": 1,
}
"""Bytes of a number, by the format's name of its type."""
_LIMIT = 100_000_000


class HeaderError(ValueError):
    """A file is no safetensors file, or is cut off; the message names it and what was found."""


@dataclass(frozen=True)
class TensorEntry:
    """A tensor in a safetensors file.

    Attributes:
        dtype: As the format writes it (`BF16`).
        shape: Of the tensor.
        start: First byte in the file.
        stop: The byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """What a safetensors file says of itself.

    Attributes:
        entries: Its tensors, in the header's order.
        metadata: The strings stored beside them.
    """

    entries: dict[str, TensorEntry]
    metadata: dict[str, str]


def read_header(path: Path) -> Header:
    """Read a header and check it against the file's size.

    Raises:
        FileNotFoundError: There is no such file.
        HeaderError: It is cut off, or no safetensors file.
    """
    size = path.stat().st_size
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not 2 <= length <= min(size - 8, _LIMIT):
            raise HeaderError(f"{path} is no safetensors file: a header of {length} bytes in {size}")
        try:
            content = parse_json(stream.read(length))
        except ValueError as error:
            raise HeaderError(f"{path} is no safetensors file: {error}") from error
    if not isinstance(content, dict) or not isinstance(metadata := content.pop("__metadata__", {}), dict):
        raise HeaderError(f"{path} is no safetensors file: its header is no table of tensors")
    entries = {name: _entry(path, name, item, 8 + length, size) for name, item in content.items()}
    return Header(entries, metadata)


def _entry(path: Path, name: str, item: Any, offset: int, size: int) -> TensorEntry:
    try:
        first, last = map(index, item["data_offsets"])
        entry = TensorEntry(
            str(item["dtype"]), tuple(map(index, item["shape"])), offset + first, offset + last
        )
        width = ITEM_BYTES.get(entry.dtype)
        nbytes = entry.stop - entry.start
        whole = nbytes >= 0 and first >= 0 and entry.stop <= size and min(entry.shape, default=0) >= 0
        whole = whole and (width is None or nbytes == prod(entry.shape) * width)
    except (KeyError, TypeError, ValueError) as error:
        raise HeaderError(
            f"{path} is no safetensors file: its entry of {name} is malformed ({error!r})"
        ) from error
    if not whole:
        raise HeaderError(
            f"{path} is cut off or damaged: {name} {entry.dtype}{list(entry.shape)} ends at byte "
            f"{entry.stop} of {size}"
        )
    return entry
