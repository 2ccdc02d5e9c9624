"""SYNTH parquet to Harmony conversations in parquet: the shards `synth_harmony_shard_NN.parquet`.

Columns: `messages_json` and `metadata_json` (ASCII JSON), then the seven metadata fields, all nullable
strings, compressed with zstd. Rows without one of the three texts are skipped and counted. Shard `i` of
`n` holds the complete rows among the `i`-th of `n` equal parts of the input (see `rows`).
"""

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from trainer.contract.canonical import sha256_json
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.completion import ShardWork, shard_key, sweep
from vpmoe_assets.harmony.conversation import METADATA_FIELDS, TEXT_FIELDS, is_complete, messages_json
from vpmoe_assets.harmony.pool import Engine, Progress, run_shards
from vpmoe_assets.harmony.rows import InputFile, inspect_inputs, read_batches, shard_range
from vpmoe_assets.lineage.digest import file_sha256

if TYPE_CHECKING:
    import pyarrow as pa

SCHEMA_VERSION = "synth_harmony_v1"
COLUMNS = ("messages_json", "metadata_json", *METADATA_FIELDS)


@dataclass(frozen=True)
class HarmonyWorker:
    """Builds synth_harmony shards; picklable and idempotent.

    Args:
        files: The whole input.
        num_shards: Shards in all.
        scaffold: System and developer message.
        row_group_rows: Rows per parquet row group.
        payload_dir: Gets the shards.
        state_dir: Gets completion records.
    """

    files: tuple[InputFile, ...]
    num_shards: int
    scaffold: Scaffold
    row_group_rows: int
    payload_dir: Path
    state_dir: Path

    def __call__(self, shard: int, report: Callable[[int], None]) -> dict[str, Any]:
        """Build shard `shard` unless it is finished; returns its entry in the manifest."""
        start, stop = shard_range(sum(file.rows for file in self.files), shard, self.num_shards)
        key = shard_key(
            kind=SCHEMA_VERSION,
            shard=[shard, self.num_shards],
            input=[[file.rows, file.sha256] for file in self.files],
            scaffold=self.scaffold.as_dict(),
            row_group_rows=self.row_group_rows,
        )
        work = ShardWork(shard, key, self.payload_dir, self.state_dir)
        with work.held():
            return self._made(work, start, stop, report)

    def _made(self, work: ShardWork, start: int, stop: int, report: Callable[[int], None]) -> dict[str, Any]:
        if (done := work.completed()) is not None:
            report(stop - start)
            return done
        name = shard_file_name(work.shard)
        work.begin()
        entry = self._write(self.payload_dir / name, start, stop, report)
        entry = {"path": name, **entry}
        work.finish({name: entry["sha256"]}, [], entry)
        return entry

    def _write(self, path: Path, start: int, stop: int, report: Callable[[int], None]) -> dict[str, Any]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        skipped = 0

        def complete_rows() -> Iterator[dict[str, str | None]]:
            nonlocal skipped
            for batch in read_batches(self.files, (*TEXT_FIELDS, *METADATA_FIELDS), start, stop):
                for position in range(len(batch)):
                    row = {name: values[position] for name, values in batch.columns.items()}
                    if is_complete(row):
                        yield row
                    else:
                        skipped += 1
                report(len(batch))

        schema = arrow_schema()
        groups, rows = 0, 0
        path.unlink(missing_ok=True)  # a dying worker may still hold the old file open
        with path.open("xb") as stream, pq.ParquetWriter(stream, schema, compression="zstd") as writer:
            for group in _groups(complete_rows(), self.row_group_rows):
                records = [_record(row, self.scaffold) for row in group]
                writer.write_table(pa.Table.from_pylist(records, schema), row_group_size=len(records))
                groups, rows = groups + 1, rows + len(records)
        return {
            "bytes": path.stat().st_size,
            "rows": rows,
            "row_groups": groups,
            "sha256": file_sha256(path),
            "skipped": skipped,
            "input_rows": [start, stop],
        }


def shard_file_name(shard: int) -> str:
    """`synth_harmony_shard_03.parquet`."""
    return f"synth_harmony_shard_{shard:02d}.parquet"


def arrow_schema() -> "pa.Schema":
    """All columns are nullable strings."""
    import pyarrow as pa

    return pa.schema([pa.field(name, pa.string()) for name in COLUMNS])


def build_synth_harmony(
    input_files: Sequence[Path],
    payload_dir: Path,
    state_dir: Path,
    *,
    scaffold: Scaffold,
    num_shards: int,
    row_group_rows: int,
    git_sha: str,
    created_unix_s: int,
    processes: int = 1,
    engine: Engine | None = None,
    progress: Callable[[str, int], Progress] | None = None,
) -> dict[str, Any]:
    """Build all shards and return the manifest.

    Args:
        input_files: SYNTH-shaped parquet, in order.
        payload_dir: Gets `synth_harmony_shard_NN.parquet`.
        state_dir: Survives a crash; finished shards recorded there are not built again.
        scaffold: System and developer message.
        num_shards: Number of shards.
        row_group_rows: Rows per parquet row group.
        git_sha: Commit of the code, for the manifest.
        created_unix_s: Time of the build, for the manifest.
        processes: Worker processes; the bytes do not depend on it.
        engine: Runs the shards in their place; nor on that.
        progress: Makes a progress display from a label and the number of rows.

    Raises:
        DataError: The input is damaged or lacks a column, or no row is complete.
        ValueError: A number is out of range, or `git_sha` is empty.
    """
    if not 1 <= num_shards <= 100:
        raise ValueError(f"num_shards must lie in [1, 100] (shard names have two digits), got {num_shards}")
    if row_group_rows < 1:
        raise ValueError(f"row_group_rows must be at least 1, got {row_group_rows}")
    if not git_sha:
        raise ValueError("git_sha must name the commit that makes the manifest")
    files = tuple(inspect_inputs(input_files))
    worker = HarmonyWorker(files, num_shards, scaffold, row_group_rows, payload_dir, state_dir)
    payload_dir.mkdir(parents=True, exist_ok=True)
    if progress is not None:
        with progress("synth_harmony", sum(file.rows for file in files)) as display:
            shards = run_shards(worker, num_shards, processes, display, engine)
    else:
        shards = run_shards(worker, num_shards, processes, engine=engine)
    if not sum(shard["rows"] for shard in shards):
        raise DataError(f"no row of {len(files)} input files has all of {', '.join(TEXT_FIELDS)}")
    sweep(payload_dir, (shard["path"] for shard in shards))
    return build_manifest(
        files, shards, scaffold, payload_dir, git_sha=git_sha, created_unix_s=created_unix_s
    )


def build_manifest(
    files: Sequence[InputFile],
    shards: Sequence[dict[str, Any]],
    scaffold: Scaffold,
    payload_dir: Path,
    *,
    git_sha: str,
    created_unix_s: int,
) -> dict[str, Any]:
    """Return the manifest of finished shards, in shard order."""
    listing = [{"name": file.name, "rows": file.rows, "sha256": file.sha256} for file in files]
    return {
        "schema_version": SCHEMA_VERSION,
        "created_unix_s": created_unix_s,
        "git_sha": git_sha,
        "dataset_dir": str(payload_dir),
        "conversion": {
            "dataset": listing,
            "input_sha256": sha256_json([[entry["rows"], entry["sha256"]] for entry in listing]),
            "split": "train",
            "streaming": True,
            "num_shards": len(shards),
            "sharding": "contiguous: rows [i*N//n, (i+1)*N//n) of the input, then incomplete ones skipped",
            "metadata_fields": list(METADATA_FIELDS),
            "system_message": scaffold.system(),
            "developer_message": scaffold.developer(),
            "skipped_rows": sum(shard["skipped"] for shard in shards),
        },
        "storage": {
            "format": "parquet",
            "glob": "synth_harmony_shard_*.parquet",
            "schema_arrow": str(arrow_schema()),
            "total_rows": sum(shard["rows"] for shard in shards),
            "total_bytes": sum(shard["bytes"] for shard in shards),
            "shards": list(shards),
        },
    }


def scaffold_of(manifest: dict[str, Any]) -> Scaffold:
    """Return the scaffold that a synth_harmony manifest records.

    Raises:
        DataError: The manifest is not of this schema.
    """
    if manifest.get("schema_version") != SCHEMA_VERSION:
        found = manifest.get("schema_version")
        raise DataError(f"the manifest has schema_version {found!r}, expected {SCHEMA_VERSION!r}")
    system = manifest["conversion"]["system_message"]
    developer = manifest["conversion"]["developer_message"]
    names = ("model_identity", "reasoning_effort", "conversation_start_date", "knowledge_cutoff")
    return Scaffold(
        **{name: system[name] for name in names},
        instructions=None if developer is None else developer["instructions"],
    )


def _record(row: dict[str, str | None], scaffold: Scaffold) -> dict[str, str | None]:
    metadata = {name: row[name] for name in METADATA_FIELDS}
    return {
        "messages_json": messages_json(row, scaffold),
        "metadata_json": json.dumps(metadata),
        **metadata,
    }


def _groups(rows: Iterator[dict[str, str | None]], size: int) -> Iterator[list[dict[str, str | None]]]:
    group: list[dict[str, str | None]] = []
    for row in rows:
        group.append(row)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group
