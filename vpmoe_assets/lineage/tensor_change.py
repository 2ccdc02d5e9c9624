"""The tensors of two safetensors files, streamed: how many differ, and how the first one does."""

import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.safetensors_header import Header, HeaderError, TensorEntry, read_header

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

_CHUNK = 1 << 24
"""Bytes of each side in memory at once; a multiple of every item's size."""
_FORMATS = {
    "F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4", "I16": "<i2",
    "I8": "i1", "U64": "<u8", "U32": "<u4", "U16": "<u2", "U8": "u1", "BOOL": "u1",
}  # fmt: skip


@dataclass(frozen=True)
class TensorChange:
    """How the first tensor that is not the same differs.

    Attributes:
        name: Of the tensor.
        what: One line: dtype or shape, or how many elements, the first of them, and how far.
        differing: How many tensors differ.
        tensors: How many there are.
    """

    name: str
    what: str
    differing: int
    tensors: int

    def __str__(self) -> str:
        return f"tensor {self.name}: {self.what} ({self.differing} of {self.tensors} tensors differ)"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return asdict(self)


def tensor_change(old: Path, new: Path) -> TensorChange | None:
    """Return how the tensors of two files differ; None where none does, or one is no safetensors file.

    Tensors are taken in the order in which the first file holds them, in constant memory.
    """
    try:
        before, after = read_header(old), read_header(new)
    except HeaderError:
        return None
    names = [*before.entries, *(name for name in after.entries if name not in before.entries)]
    first: tuple[str, str] | None = None
    count = 0
    with old.open("rb") as one, new.open("rb") as other:
        for name in names:
            if (what := _shape_change(name, before, after)) is None:
                left, right = before.entries[name], after.entries[name]
                if all(a == b for a, b in _chunks(one, left, other, right)):
                    continue
                what = "" if first else _values(left, _chunks(one, left, other, right))
            count += 1
            first = first or (name, what)
    return None if first is None else TensorChange(*first, count, len(names))


def _shape_change(name: str, before: Header, after: Header) -> str | None:
    if name not in after.entries:
        return "no longer there"
    if name not in before.entries:
        return "not there before"
    left, right = before.entries[name], after.entries[name]
    if (left.dtype, left.shape) == (right.dtype, right.shape):
        return None
    return f"{left.dtype}{list(left.shape)} → {right.dtype}{list(right.shape)}"


def _chunks(one: Any, left: TensorEntry, other: Any, right: TensorEntry) -> Iterator[tuple[bytes, bytes]]:
    for start in range(0, left.stop - left.start, _CHUNK):
        size = min(_CHUNK, left.stop - left.start - start)
        one.seek(left.start + start)
        other.seek(right.start + start)
        yield one.read(size), other.read(size)


def _values(entry: TensorEntry, chunks: Iterator[tuple[bytes, bytes]]) -> str:
    if entry.dtype not in _FORMATS:
        return f"{entry.dtype}{list(entry.shape)}, bytes differ"
    import numpy as np

    count = done = 0
    first: tuple[int, float, float] | None = None
    largest = squares = own = 0.0
    for raw_before, raw_after in chunks:
        before = np.frombuffer(raw_before, _FORMATS[entry.dtype])
        after = np.frombuffer(raw_after, _FORMATS[entry.dtype])
        places = np.flatnonzero(before != after)  # of bits where they are no numbers: NaN is one value
        a, b = _as_float(before, entry.dtype), _as_float(after, entry.dtype)
        own += float(np.square(a).sum())
        if places.size:
            count += int(places.size)
            gap = np.abs(a[places] - b[places])
            largest, squares = max(largest, float(gap.max())), squares + float(np.square(gap).sum())
            if first is None:
                at = int(places[0])
                first = done + at, float(a[at]), float(b[at])
        done += len(before)
    if first is None:
        return f"{entry.dtype}{list(entry.shape)}, only the signs of zeros or the bits of NaN differ"
    place = list(map(int, np.unravel_index(first[0], entry.shape))) if entry.shape else []
    relative = f"norm of it {math.sqrt(squares / own):.3g} of its own" if own else "it was all zeros"
    return (
        f"{entry.dtype}{list(entry.shape)}, {count} of {done} elements differ, the first at {place}: "
        f"{first[1]:.9g} → {first[2]:.9g}; largest difference {largest:.3g}, {relative}"
    )


def _as_float(values: "NDArray[Any]", dtype: str) -> "NDArray[np.float64]":
    if dtype == "BF16":
        import numpy as np

        return (values.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return values.astype("f8")
