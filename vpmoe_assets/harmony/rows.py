"""Reading SYNTH-shaped parquet as a stream: which files, which rows belong to which shard, batches of texts.

Rows are numbered over all input files in the order given. Shard `i` of `n` holds the contiguous rows
`[i*N//n, (i+1)*N//n)` of `N`: known from the files' footers alone, the same for any number of workers,
and each worker reads only its own rows. Both ways into the training shards use this one rule.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.conversation import METADATA_FIELDS, TEXT_FIELDS
from vpmoe_assets.input_files import require_named
from vpmoe_assets.lineage.digest import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa
    import pyarrow.parquet as pq

BATCH_ROWS = 1024
#: Enough to read a column chunk page by page instead of whole, so memory does not follow row group size.
_READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class InputFile:
    """One parquet file.

    Attributes:
        path: Where it lies.
        rows: Their number.
        sha256: Of its bytes.
        stamp: Size and time of its last change when it was inspected, by which a later change shows.
    """

    path: str
    rows: int
    sha256: str
    stamp: tuple[int, int] = field(compare=False)

    @property
    def name(self) -> str:
        """File name without directories."""
        return Path(self.path).name


@dataclass(frozen=True)
class RowBatch:
    """Consecutive rows: the number of the first, and equally long columns (absent ones are all None)."""

    first_row: int
    columns: dict[str, list[str | None]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))


def inspect_inputs(
    paths: Sequence[Path], required: Sequence[str] = ("synth_id", *TEXT_FIELDS)
) -> list[InputFile]:
    """Open every input, check its columns, count its rows and hash it.

    Args:
        paths: Parquet files, in the order in which their rows are to be read.
        required: Columns that must exist; metadata columns may be absent, others are ignored.

    Raises:
        DataError: No paths, the same file twice, or a file that is absent, damaged or lacks a column.
    """
    if not paths:
        raise DataError("no input files were given; expected at least one parquet file")
    seen: dict[Path, Path] = {}
    for path in paths:
        if (first := seen.get(real := path.resolve())) is not None:
            names = "" if first == path else f", as {first} and as {path}"
            raise DataError(f"the same input file was given twice: {real}{names}; give it once")
        seen[real] = path
    return [inspect_file(path, required) for path in paths]


def inspect_file(path: Path, required: Sequence[str], sha256: str | None = None) -> InputFile:
    """One input file: columns checked, rows counted, and hashed unless the caller knows its `sha256`.

    Raises:
        DataError: The file is absent or damaged, lacks a column, or has one twice.
    """
    require_named(path)
    if not path.is_file():
        raise DataError(f"no input file {path}")
    stamp = _stamp(path)
    with open_parquet(path) as parquet:
        names = parquet.schema_arrow.names
        if missing := [name for name in required if name not in names]:
            raise DataError(
                f"{path} has no column {', '.join(missing)}; found {', '.join(names)}. "
                f"It must have {', '.join(required)}"
            )
        for name in names:
            if name in required or name in METADATA_FIELDS:
                if names.count(name) > 1:
                    raise DataError(
                        f"{path} has {names.count(name)} columns {name}, and which one counts is not known; "
                        "write the file again with one"
                    )
                _require_text(path, name, parquet.schema_arrow.field(name).type)
        rows = parquet.metadata.num_rows
    return InputFile(str(path), rows, sha256 or file_sha256(path), stamp)


def shard_range(total: int, shard: int, count: int) -> tuple[int, int]:
    """First row and end (exclusive) of shard `shard` of `count`."""
    if not 0 <= shard < count:
        raise ValueError(f"shard must lie in [0, {count}), got {shard}")
    return shard * total // count, (shard + 1) * total // count


def locate(files: Sequence[InputFile], row: int) -> tuple[InputFile, int]:
    """Return the file that holds row `row` of the whole input, and the row's number in it."""
    for file in files:
        if row < file.rows:
            return file, row
        row -= file.rows
    raise IndexError("row lies beyond the input")


def describe_row(files: Sequence[InputFile], row: int) -> str:
    """`row 17 (part-0.parquet, row 17)`, for messages."""
    file, inside = locate(files, row)
    return f"row {row} ({file.name}, row {inside})"


def read_batches(
    files: Sequence[InputFile], columns: Sequence[str], start: int, stop: int, batch_rows: int = BATCH_ROWS
) -> Iterator[RowBatch]:
    """Rows `[start, stop)` of the input as batches of Python strings.

    Memory is one batch and one read buffer per column, whatever the size of the files.

    Raises:
        DataError: A file is damaged or has changed, or a column cannot be read as text.
    """
    offset = 0
    for file in files:
        first, last = max(start - offset, 0), min(stop - offset, file.rows)
        if first < last:
            _require_unchanged(file)
            for batch_first, batch in _file_batches(file, columns, first, last, batch_rows):
                yield RowBatch(offset + batch_first, batch)
            _require_unchanged(file)
        offset += file.rows


def _stamp(path: Path) -> tuple[int, int]:
    found = path.stat()
    return found.st_size, found.st_mtime_ns


def _require_unchanged(file: InputFile) -> None:
    path = Path(file.path)
    if not path.is_file() or _stamp(path) != file.stamp:
        raise DataError(f"{path} has changed while it was read; build again when nothing writes to it")


def open_parquet(path: Path) -> "pq.ParquetFile":
    """Open a parquet file; the checksums of its pages, where it has some, are compared as they are read.

    Raises:
        DataError: It is no parquet file, or is cut off.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(
            path, buffer_size=_READ_BUFFER, pre_buffer=False, page_checksum_verification=True
        )
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:  # the last: of a column's name
        raise damaged(path, error) from error


def damaged(path: Path, error: Exception) -> DataError:
    """Return what is said of a parquet file that cannot be read."""
    reason = next(iter(str(error).splitlines()), type(error).__name__)
    return DataError(f"{path} is not a whole parquet file (truncated or damaged): {reason}")


def _require_text(path: Path, name: str, kind: "pa.DataType") -> None:
    import pyarrow.types as types

    inner = kind.value_type if types.is_dictionary(kind) else kind
    textual = types.is_string(inner) or types.is_large_string(inner) or types.is_string_view(inner)
    scalar = types.is_integer(inner) or types.is_boolean(inner) or types.is_floating(inner)
    if textual or types.is_null(inner) or (scalar and name in METADATA_FIELDS):
        return
    raise DataError(f"{path}: column {name} has type {kind}, expected string")


def _file_batches(
    file: InputFile, columns: Sequence[str], first: int, last: int, batch_rows: int
) -> Iterator[tuple[int, dict[str, list[str | None]]]]:
    import pyarrow as pa

    path = Path(file.path)
    with open_parquet(path) as parquet:
        present = [name for name in columns if name in parquet.schema_arrow.names]
        group_first = 0
        for group in range(parquet.num_row_groups):
            group_rows = parquet.metadata.row_group(group).num_rows
            if group_first < last and group_first + group_rows > first:
                row = group_first
                try:
                    for batch in parquet.iter_batches(batch_rows, [group], present, use_threads=False):
                        low, high = max(first - row, 0), min(last - row, batch.num_rows)
                        if low < high:
                            yield row + low, _texts(path, batch.slice(low, high - low), columns)
                        row += batch.num_rows
                        if row >= last:
                            break
                except (pa.ArrowException, OSError) as error:
                    raise damaged(path, error) from error
            group_first += group_rows


def _texts(path: Path, batch: "pa.RecordBatch", columns: Sequence[str]) -> dict[str, list[str | None]]:
    import pyarrow as pa

    texts: dict[str, list[str | None]] = {}
    for name in columns:
        position = batch.schema.get_field_index(name)
        if position < 0:
            texts[name] = [None] * batch.num_rows
            continue
        column: Any = batch.column(position)
        try:
            texts[name] = (
                column if pa.types.is_string(column.type) else column.cast(pa.string())
            ).to_pylist()
        except (UnicodeDecodeError, pa.ArrowInvalid) as error:
            raise DataError(f"{path}: column {name} holds bytes that are not UTF-8 ({error})") from error
    return texts
