"""The rows of two data sets: which were added, removed, and changed.

A row is a row of a parquet file, a line of a JSON Lines file, or one sequence of a shard's arrays (tokens
with their masks and spans). It is known by its `synth_id` or `id`, where it has one; a sequence by its
tokens; any other row by all that it says, and then it is added or removed, never changed. Directories inside
a payload are splits: a row that moved to another split was removed there and added here. Every file is read
once, and again where a row is to be named; memory holds some 200 bytes a row.
"""

import hashlib
import json
import struct
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.indexed import DTYPES, HEADER_BYTES, unpack_header
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.errors import ArtifactDamaged, ComparisonError

EXAMPLES = 20
"""Rows of each sort that are named."""
_KEYS = ("synth_id", "id")
_MAIN = "tokens"
_BATCH = 1024


@dataclass(frozen=True, slots=True)
class ChangedRow:
    """One row that is on both sides under one name.

    Attributes:
        row: `split/name`, or the name alone.
        columns: Names of what differs in it.
    """

    row: str
    columns: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class RowChanges:
    """What differs between the rows of two data sets.

    Attributes:
        old_rows: Of the first.
        new_rows: Of the second.
        added: How many only the second has.
        removed: How many only the first has.
        changed: How many are on both sides and differ.
        reordered: The rows are the same, in another order.
        columns: How many changed rows differ in each column, among those of `examples`.
        added_examples: Names of the first of them.
        removed_examples: The same.
        examples: The first changed rows.
    """

    old_rows: int
    new_rows: int
    added: int
    removed: int
    changed: int
    reordered: bool
    columns: Mapping[str, int]
    added_examples: tuple[str, ...]
    removed_examples: tuple[str, ...]
    examples: tuple[ChangedRow, ...]


@dataclass(frozen=True, slots=True)
class _Row:
    name: str
    key: bytes
    content: bytes
    columns: Mapping[str, Any]


def compare_rows(old: Path, new: Path) -> RowChanges:
    """Compare the rows of two payloads.

    Args:
        old: Payload of the first.
        new: Payload of the second.

    Raises:
        ComparisonError: One holds no file of a format whose rows are known.
        ArtifactDamaged: A file cannot be read.
    """
    before, one = _known(old)
    after, other = _known(new)
    added: set[bytes] = set()
    removed: set[bytes] = set()
    changed: set[bytes] = set()
    counts = {"added": 0, "removed": 0, "changed": 0}
    for key in before.keys() | after.keys():
        gone, came = _less(before.get(key, ()), after.get(key, ()))
        both = min(gone, came)
        for what, number, keys in (
            ("changed", both, changed),
            ("removed", gone - both, removed),
            ("added", came - both, added),
        ):
            if number:
                counts[what] += number
                keys.add(key)
    examples = _examples(old, new, changed)
    columns: dict[str, int] = {}
    for row in examples:
        for name in row.columns:
            columns[name] = columns.get(name, 0) + 1
    return RowChanges(
        old_rows=sum(map(len, before.values())),
        new_rows=sum(map(len, after.values())),
        **counts,
        reordered=not any(counts.values()) and one != other,
        columns=columns,
        added_examples=_names(new, added),
        removed_examples=_names(old, removed),
        examples=examples,
    )


def _known(payload: Path) -> tuple[dict[bytes, list[bytes]], bytes]:
    """Return the digests of all rows by key, and one of their order."""
    found: dict[bytes, list[bytes]] = {}
    order = hashlib.blake2b(digest_size=16)
    for row in _rows(payload):
        found.setdefault(row.key, []).append(row.content)
        order.update(row.key + row.content)
    return found, order.digest()


def _less(old: list[bytes] | tuple[()], new: list[bytes] | tuple[()]) -> tuple[int, int]:
    """Return how many of each side are not on the other, as often as they occur."""
    rest = list(new)
    gone = 0
    for content in old:
        if content in rest:
            rest.remove(content)
        else:
            gone += 1
    return gone, len(rest)


def _names(payload: Path, keys: set[bytes]) -> tuple[str, ...]:
    found: list[str] = []
    if keys:
        for row in _rows(payload):
            if row.key in keys:
                found.append(row.name)
                if len(found) == EXAMPLES:
                    break
    return tuple(found)


def _examples(old: Path, new: Path, keys: set[bytes]) -> tuple[ChangedRow, ...]:
    """Return the first changed rows of the first side, with the columns in which they differ."""
    if not keys:
        return ()
    first: dict[bytes, _Row] = {}
    for row in _rows(old):
        if row.key in keys and row.key not in first:
            first[row.key] = row
            if len(first) == EXAMPLES:
                break
    found: dict[bytes, ChangedRow] = {}
    for row in _rows(new):
        one = first.get(row.key)
        if one is None or row.key in found:
            continue
        names = sorted(one.columns.keys() | row.columns.keys())
        differing = tuple(name for name in names if one.columns.get(name) != row.columns.get(name))
        if differing:
            found[row.key] = ChangedRow(row.name, differing)
            if len(found) == len(first):
                break
    return tuple(found.values())


def _rows(payload: Path) -> Iterator[_Row]:
    if not payload.is_dir():
        raise ComparisonError(f"{payload} is gone: it was collected or removed; `vpmoe verify` says which")
    paths = sorted(path for path in payload.rglob("*") if path.suffix in (".parquet", ".jsonl", ".idx"))
    if not paths:
        raise ComparisonError(
            f"{payload} holds no rows that are known here (parquet, JSON Lines, IndexedDataset)"
        )
    shards = set()
    for path in paths:
        split = path.parent.relative_to(payload).as_posix()
        split = "" if split == "." else f"{split}/"
        if path.suffix == ".parquet":
            yield from _table(path, split)
        elif path.suffix == ".jsonl":
            yield from _lines(path, split)
        elif (stem := path.stem.rpartition("_")[0] or path.stem) and (split, stem) not in shards:
            shards.add((split, stem))
            yield from _sequences(
                [p for p in paths if p.parent == path.parent and p.stem.startswith(f"{stem}_")] or [path],
                split,
            )


def _table(path: Path, split: str) -> Iterator[_Row]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(_BATCH):
                for columns in batch.to_pylist():
                    yield _row(columns, split)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise ArtifactDamaged(f"{path} cannot be read: {error}") from error


def _lines(path: Path, split: str) -> Iterator[_Row]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            try:
                columns = parse_json(line)
            except ValueError as error:
                raise ArtifactDamaged(f"{path}:{number} is no JSON: {error}") from error
            yield _row(columns if isinstance(columns, dict) else {"value": columns}, split)


def _row(columns: Mapping[str, Any], split: str) -> _Row:
    text = json.dumps(columns, sort_keys=True, default=_plain).encode()
    content = _digest(text)
    name = next((str(columns[key]) for key in _KEYS if columns.get(key) is not None), None)
    known = content if name is None else name.encode("utf-8", "surrogatepass")
    key = _digest(split.encode() + b"\0" + known)
    return _Row(split + (name or f"row {content.hex()[:12]}"), key, content, columns)


def _plain(value: Any) -> str:
    return value.hex() if isinstance(value, bytes) else str(value)


def _sequences(indices: list[Path], split: str) -> Iterator[_Row]:
    """Yield the rows of one shard: the sequence of each of its arrays, in step."""
    arrays = {path.stem.rpartition("_")[2]: list(_lengths(path)) for path in indices}
    counts = {name: len(lengths) for name, lengths in arrays.items()}
    if len(set(counts.values())) > 1:
        raise ArtifactDamaged(f"{indices[0].parent}: arrays of one shard have unequal lengths: {counts}")
    main = _MAIN if _MAIN in arrays else sorted(arrays)[0]
    opened = {path.stem.rpartition("_")[2]: path.with_suffix(".bin").open("rb") for path in indices}
    try:
        for number in range(counts[main]):
            columns = {name: opened[name].read(arrays[name][number]) for name in arrays}
            if any(len(columns[name]) != arrays[name][number] for name in arrays):
                raise ArtifactDamaged(f"{indices[0].with_suffix('.bin')} is cut off at sequence {number}")
            digest = _digest(columns[main])
            content = _digest(b"\0".join(name.encode() + _digest(columns[name]) for name in sorted(columns)))
            key = _digest(split.encode() + b"\0" + digest)
            yield _Row(f"{split}tokens {digest.hex()[:12]}", key, content, columns)
    finally:
        for file in opened.values():
            file.close()


def _lengths(path: Path) -> Iterator[int]:
    """Yield the bytes of each sequence of an array."""
    content = path.read_bytes()
    if len(content) < HEADER_BYTES:
        raise ArtifactDamaged(f"{path} is no IndexedDataset index: only {len(content)} bytes")
    header = unpack_header(content)
    if not header.known or header.code not in DTYPES or len(content) != header.file_bytes:
        raise ArtifactDamaged(f"{path} is no IndexedDataset index that is known here, or is cut off")
    width = int(DTYPES[header.code][-1])
    for (length,) in struct.iter_unpack("<i", content[HEADER_BYTES : HEADER_BYTES + 4 * header.sequences]):
        yield length * width


def _digest(content: bytes) -> bytes:
    return hashlib.blake2b(content, digest_size=16).digest()
