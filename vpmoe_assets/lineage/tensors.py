"""The tensors of two checkpoints, one at a time: how far each is from its other, in flat memory.

Read in blocks straight from the safetensors files, widened to float64. Norms are Euclidean, over all elements
of a tensor: `‖b − a‖` and `‖b − a‖ / ‖a‖`.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.safetensors_header import ITEM_BYTES, HeaderError, TensorEntry, read_header
from vpmoe_assets.lineage.errors import ArtifactDamaged, ComparisonError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

_BLOCK = 1 << 20
"""Elements that are in memory at a time."""
_NUMPY = {
    **{"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "BOOL": "|b1"},
    **{"I64": "<i8", "I32": "<i4", "I16": "<i2", "I8": "|i1", "U8": "|u1"},
}


@dataclass(frozen=True, slots=True)
class TensorChange:
    """One tensor that is not the same on both sides.

    Attributes:
        name: Of the tensor.
        old: `dtype[shape]`, or None where it is not there.
        new: The same of the other side.
        norm: Euclidean norm of the difference; None where the shapes differ or one side lacks it.
        relative: The norm, divided by that of the first; None as well where the first is zero.
        largest: Largest absolute difference of an element.
        moved: Fraction of the elements whose values differ.
        not_finite: Elements that are NaN or infinite on either side; they are left out of the figures.
    """

    name: str
    old: str | None
    new: str | None
    norm: float | None = None
    relative: float | None = None
    largest: float | None = None
    moved: float | None = None
    not_finite: int = 0


@dataclass(frozen=True, slots=True)
class TensorChanges:
    """What differs between the tensors of two checkpoints.

    Attributes:
        changed: Those that differ, the largest relative change first.
        same: How many are equal, bit for bit.
        norm: Euclidean norm of the difference over all tensors that both have in one shape.
        relative: The norm, divided by that of the first's tensors.
    """

    changed: tuple[TensorChange, ...]
    same: int
    norm: float
    relative: float | None


def compare_tensors(old: Path, new: Path) -> TensorChanges:
    """Compare the tensors in the safetensors files of two payloads.

    Args:
        old: Payload of the first.
        new: Payload of the second.

    Raises:
        ComparisonError: One of them has no such file.
        ArtifactDamaged: A file is gone, cut off, or none of that format.
    """
    before, after = _tensors(old), _tensors(new)
    changed: list[TensorChange] = []
    same, squares, size = 0, 0.0, 0.0
    for name in sorted(before.keys() | after.keys()):
        one, other = before.get(name), after.get(name)
        if one is None or other is None or one[1].shape != other[1].shape:
            changed.append(TensorChange(name, one and _said(one[1]), other and _said(other[1])))
            continue
        found = _compare(one, other)
        squares, size = squares + found.squares, size + found.size
        if not found.differs and one[1].dtype == other[1].dtype:
            same += 1
            continue
        norm, own = math.sqrt(found.squares), math.sqrt(found.size)
        changed.append(
            TensorChange(
                name,
                _said(one[1]),
                _said(other[1]),
                norm,
                norm / own if own else None,
                found.largest,
                found.moved / max(1, math.prod(one[1].shape)),
                found.not_finite,
            )
        )
    changed.sort(key=lambda each: (each.norm is not None, -(each.relative or 0.0), each.name))
    return TensorChanges(
        tuple(changed), same, math.sqrt(squares), math.sqrt(squares / size) if size else None
    )


@dataclass(slots=True)
class _Sums:
    differs: bool = False
    squares: float = 0.0
    size: float = 0.0
    largest: float = 0.0
    moved: int = 0
    not_finite: int = 0


def _tensors(payload: Path) -> dict[str, tuple[Path, TensorEntry]]:
    files = sorted(payload.rglob("*.safetensors"))
    if not files:
        raise ComparisonError(
            f"{payload} holds no safetensors file: only checkpoints have tensors to compare"
            if payload.is_dir()
            else f"{payload} is gone: it was collected or removed; `vpmoe verify` says which"
        )
    found: dict[str, tuple[Path, TensorEntry]] = {}
    for path in files:
        try:
            entries = read_header(path).entries
        except (OSError, HeaderError) as error:
            raise ArtifactDamaged(str(error)) from error
        for name, entry in entries.items():
            if entry.dtype not in _NUMPY:
                raise ComparisonError(f"{path}: {name} is of type {entry.dtype}, which cannot be compared")
            found[name] = (path, entry)
    return found


def _said(entry: TensorEntry) -> str:
    return f"{entry.dtype}{list(entry.shape)}"


def _compare(one: tuple[Path, TensorEntry], other: tuple[Path, TensorEntry]) -> _Sums:
    import numpy as np

    sums = _Sums()
    for raw, theirs in zip(_blocks(*one), _blocks(*other), strict=True):
        if raw.dtype == theirs.dtype and one[1].dtype == other[1].dtype and raw.tobytes() == theirs.tobytes():
            if one[1].dtype[0] in "FB":
                sums.size += float(np.square(_finite(_wide(raw, one[1].dtype))).sum())
            else:
                sums.size += float(np.square(_wide(raw, one[1].dtype)).sum())
            continue
        sums.differs = True
        a, b = _wide(raw, one[1].dtype), _wide(theirs, other[1].dtype)
        finite = np.isfinite(a) & np.isfinite(b)
        sums.not_finite += int(a.size - finite.sum())
        sums.moved += int(np.count_nonzero(a != b))
        a, b = a[finite], b[finite]
        if a.size:
            gap = b - a
            sums.squares += float(np.square(gap).sum())
            sums.size += float(np.square(a).sum())
            sums.largest = max(sums.largest, float(np.abs(gap).max()))
    return sums


def _finite(values: "npt.NDArray[np.float64]") -> "npt.NDArray[np.float64]":
    import numpy as np

    return values[np.isfinite(values)]


def _blocks(path: Path, entry: TensorEntry) -> "Iterator[npt.NDArray[Any]]":
    import numpy as np

    count = math.prod(entry.shape)
    with path.open("rb") as stream:
        stream.seek(entry.start)
        for start in range(0, count, _BLOCK):
            wanted = min(_BLOCK, count - start)
            content = stream.read(wanted * ITEM_BYTES[entry.dtype])
            yield np.frombuffer(content, dtype=_NUMPY[entry.dtype], count=wanted)


def _wide(raw: "npt.NDArray[Any]", dtype: str) -> "npt.NDArray[np.float64]":
    """Return the values as float64; bfloat16 is the upper half of a float32."""
    import numpy as np

    if dtype == "BF16":
        return (raw.astype(np.uint32) << np.uint32(16)).view(np.float32).astype(np.float64)
    return raw.astype(np.float64)
