"""The files of a data set in groups of one form, each with its fields and the number of its rows.

What a field is called and holds is read from the files themselves: the schema of parquet, the first line of
JSON lines, the header of an index, the description of a top-K store.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from trainer.contract.indexed import DTYPES, HEADER_BYTES, unpack_header
from vpmoe_assets.lineage.errors import ComparisonError
from vpmoe_assets.lineage.record import Record

Form = Literal["parquet", "json lines", "IndexedDataset", "top-K"]
TYPES = {"text": "sc:Text", "integer": "sc:Integer", "number": "sc:Float", "boolean": "sc:Boolean"}
"""Types of fields, and their names in schema.org."""


@dataclass(frozen=True)
class RowField:
    """One column.

    Attributes:
        name: Of the column.
        type: One of `TYPES`.
        many: Whether a row has a list of them.
        description: What it holds, where the name does not say it.
    """

    name: str
    type: str
    many: bool = False
    description: str = ""


@dataclass(frozen=True)
class RowFiles:
    """Files with rows of one form.

    Attributes:
        name: Unique in the data set.
        form: Of the files.
        paths: Relative to the payload; of an IndexedDataset both files of each shard.
        fields: In the order of the files.
        rows: How many there are.
    """

    name: str
    form: Form
    paths: tuple[str, ...]
    fields: tuple[RowField, ...]
    rows: int


def holds_rows(record: Record) -> bool:
    """Whether an artifact is a data set, by its files."""
    suffixes = {PurePosixPath(entry.path).suffix for entry in record.files}
    return not record.evals and bool(suffixes & {".parquet", ".jsonl", ".idx", ".topk"})


def row_files(record: Record, payload: Path) -> list[RowFiles]:
    """Return the groups of a data set's files, sorted by name.

    Args:
        record: Of the data set.
        payload: Its directory.

    Raises:
        ComparisonError: A file cannot be read; `vpmoe verify` says more.
    """
    groups: dict[tuple[str, Form, tuple[RowField, ...]], tuple[list[str], int]] = {}
    try:
        for name, form, paths, fields, rows in _files(record, payload):
            known, count = groups.setdefault((name, form, fields), ([], 0))
            groups[name, form, fields] = ([*known, *paths], count + rows)
    except (OSError, ValueError, KeyError) as error:
        raise ComparisonError(f"{payload}: its rows cannot be read ({error}); `vpmoe verify` it") from error
    names = [name for name, _, _ in groups]
    return sorted(
        (
            RowFiles(name if names.count(name) == 1 else _common(paths), form, tuple(paths), fields, rows)
            for (name, form, fields), (paths, rows) in groups.items()
        ),
        key=lambda each: each.name,
    )


def _files(
    record: Record, payload: Path
) -> Iterator[tuple[str, Form, Sequence[str], tuple[RowField, ...], int]]:
    """Yield of each file, or pair of files: name of its group, form, paths, fields, rows."""
    for entry in record.files:
        path = PurePosixPath(entry.path)
        folder = "_".join(path.parent.parts)
        match path.suffix:
            case ".parquet":
                yield (folder or "rows", "parquet", [entry.path], *_parquet(payload / path))
            case ".jsonl":
                yield (folder or "rows", "json lines", [entry.path], *_json_lines(payload / path))
            case ".idx":
                array = path.stem.rpartition("_")[2]
                pair = [str(path.with_suffix(".bin")), entry.path]
                name = f"{folder}_{array}" if folder else array
                yield (name, "IndexedDataset", pair, *_indexed(payload / path, array))
            case ".topk":
                yield (folder or "rows", "top-K", [entry.path], *_topk(payload, path))


def _parquet(path: Path) -> tuple[tuple[RowField, ...], int]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
    except pa.ArrowException as error:
        raise ValueError(f"{path.name}: {error}") from error
    with file:
        return tuple(_arrow(each.name, each.type) for each in file.schema_arrow), file.metadata.num_rows


def _arrow(name: str, kind: Any) -> RowField:
    import pyarrow as pa

    many = pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind)
    item = kind.value_type if many else kind
    if pa.types.is_boolean(item):
        return RowField(name, "boolean", many)
    if pa.types.is_integer(item):
        return RowField(name, "integer", many)
    return RowField(name, "number" if pa.types.is_floating(item) else "text", many)


def _json_lines(path: Path) -> tuple[tuple[RowField, ...], int]:
    with path.open("rb") as file:
        first = json.loads(next(file, b"{}"))
        rows = 1 + sum(1 for line in file if line.strip())
    if not isinstance(first, dict):
        raise ValueError(f"{path.name}: its lines are no objects")
    return tuple(_json_field(name, value) for name, value in first.items()), rows if first else 0


def _json_field(name: str, value: Any) -> RowField:
    many = isinstance(value, list)
    item = (value or [""])[0] if many else value
    kinds = {bool: "boolean", int: "integer", float: "number"}
    return RowField(name, kinds.get(type(item), "text"), many)


def _indexed(path: Path, array: str) -> tuple[tuple[RowField, ...], int]:
    with path.open("rb") as file:
        start = file.read(HEADER_BYTES)
    if len(start) < HEADER_BYTES or not (header := unpack_header(start)).known:
        raise ValueError(f"{path.name} is no index")
    kind = {"u1": "uint8", "<i4": "int32"}.get(DTYPES.get(header.code, ""), f"type {header.code}")
    said = f"A sequence of {kind} in .bin, cut as .idx says (Megatron's IndexedDataset, version 1)."
    return (RowField(array, "integer", True, said),), header.sequences


def _topk(payload: Path, path: PurePosixPath) -> tuple[tuple[RowField, ...], int]:
    told = json.loads((payload / "store.json").read_bytes())
    split = told["splits"][path.parent.name]
    count = {each["name"]: each["tokens"] for each in split["shards"]}[path.name]
    fields = (
        RowField("label_logprob", "number", False, "Natural log-probability of the token that stands there."),
        RowField("ids", "integer", True, f"The likeliest token ids, up to {told['topk']}."),
        RowField("logprobs", "number", True, "Their natural log-probabilities."),
        RowField("tail_logprob", "number", False, "Log of the probability of all other ids."),
    )
    return fields, int(count)


def _common(paths: Sequence[str]) -> str:
    """Return a name for some of the files of a directory, which others of the same form do not have."""
    first = PurePosixPath(paths[0]).with_suffix("").as_posix().replace("/", "_")
    return first if len(paths) == 1 else f"{first}_and_{len(paths) - 1}_more"
