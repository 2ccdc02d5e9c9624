"""The files of a payload against what a manifest states of them."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.verdict import Verdict


def source_files_match(payload_dir: Path, manifest: dict[str, Any]) -> Verdict:
    """Check that the files of a source are exactly those of its manifest: names, bytes, sha256, rows."""
    storage = manifest["storage"]
    shards = [*storage["shards"], *([storage["table"]] if "table" in storage else [])]
    faults = file_faults(payload_dir, {shard["path"]: (shard["bytes"], shard["sha256"]) for shard in shards})
    count = _ROWS.get(storage.get("format", ""))
    if not faults and count is not None:
        faults = row_faults(payload_dir, storage, count)
    return Verdict.of(faults, f"{len(shards)} files as the manifest says", {"files": len(shards)})


def row_faults(payload_dir: Path, storage: Mapping[str, Any], count: Callable[[Path], int]) -> list[str]:
    """Return the files whose rows, counted again, are not as many as a manifest says.

    Args:
        payload_dir: Directory of the files.
        storage: Of the manifest; numbers of rows that it does not state are not compared.
        count: Counts the rows of a file.
    """
    found = {shard["path"]: count(payload_dir / shard["path"]) for shard in storage["shards"]}
    stated = [(shard["path"], shard.get("rows"), found[shard["path"]]) for shard in storage["shards"]]
    stated.append(("all files", storage.get("total_rows"), sum(found.values())))
    return [
        f"{name}: {rows} rows, the manifest says {said}"
        for name, said, rows in stated
        if said not in (None, rows)
    ]


def _parquet_rows(path: Path) -> int:
    import pyarrow.parquet as pq

    return int(pq.read_metadata(path).num_rows)


def _lines(path: Path) -> int:
    with path.open("rb") as lines:
        return sum(1 for line in lines if line.strip())


_ROWS: Mapping[str, Callable[[Path], int]] = {"parquet": _parquet_rows, "jsonl": _lines}
"""How the rows of a file are counted, by its format."""


def file_faults(payload_dir: Path, expected: Mapping[str, tuple[int, str]]) -> list[str]:
    """Return what is missing, added, or of another size or content.

    Args:
        payload_dir: Directory of the files.
        expected: Size in bytes and sha256 of each file, by its path in the directory.
    """
    present = {path.relative_to(payload_dir).as_posix() for path in payload_dir.rglob("*") if path.is_file()}
    faults = [f"{name} is missing" for name in sorted(set(expected) - present)]
    faults += [f"{name} is not in the manifest" for name in sorted(present - set(expected))]
    for name in sorted(present & set(expected)):
        size, digest = expected[name]
        path = payload_dir / name
        if path.stat().st_size != size:
            faults.append(f"{name} has {path.stat().st_size} bytes, the manifest says {size}")
        elif (found := file_sha256(path)) != digest:
            faults.append(f"{name} has sha256 {found}, the manifest says {digest}")
    return faults
