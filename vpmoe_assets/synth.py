"""SYNTH rows that others wrote: the parquet files of a pinned commit, or of a local folder."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.rows import inspect_inputs
from vpmoe_assets.hub import HubClient, HuggingFaceHub, fetch, require_commit, select_files
from vpmoe_assets.lineage.digest import file_sha256


def fetch_synth(
    source: Any,
    directory: Path,
    *,
    client: HubClient | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> dict[str, Any]:
    """Bring the SYNTH parquet files of a pinned commit into `directory`.

    Args:
        source: The experiment's `sources.synth` of kind `hub` (repo, revision, files).
        directory: Kept between attempts, so that nothing is downloaded twice.
        client: Of the hub; the public one by default.
        progress: Called with the number of new bytes.

    Returns:
        The manifest: repository, commit, and name, bytes and sha256 of each file.

    Raises:
        HubError: See `fetch` and `select_files`.
    """
    require_commit(source.repo, source.revision, "sources.synth.revision")
    hub = client if client is not None else HuggingFaceHub()
    files = select_files(hub.list_files(source.repo, "dataset", source.revision), source.files)
    for file in files:
        fetch(hub, source.repo, "dataset", source.revision, file, directory, progress=progress)
    return {
        "schema_version": "synth_source_v1",
        "kind": "hub",
        "description": f"{source.repo} at commit {source.revision}.",
        "repo": source.repo,
        "revision": source.revision,
        "storage": {
            "format": "parquet",
            "glob": "*.parquet",
            "total_bytes": sum(file.size for file in files),
            "shards": [{"path": file.path, "bytes": file.size, "sha256": file.sha256} for file in files],
        },
    }


def copy_parquet(files: Sequence[Path], directory: Path) -> dict[str, Any]:
    """Copy SYNTH-shaped parquet files into `directory`.

    Args:
        files: Of a local folder, in the order of their rows.
        directory: Existing.

    Returns:
        The manifest: name, rows, bytes and sha256 of each file.

    Raises:
        DataError: A file is no parquet, or lacks a column: nothing is copied then. Or one changes meanwhile.
    """
    inputs = inspect_inputs(files)  # before anything is copied, so that a message names the user's file
    for file, entry in zip(files, inputs, strict=True):
        shutil.copyfile(file, directory / file.name)
        if file_sha256(directory / file.name) != entry.sha256:
            raise DataError(f"{file} has changed while it was copied; start again when nothing writes to it")
    shards = [
        {
            "path": entry.name,
            "rows": entry.rows,
            "bytes": (directory / entry.name).stat().st_size,
            "sha256": entry.sha256,
        }
        for entry in inputs
    ]
    return {
        "schema_version": "synth_source_v1",
        "kind": "parquet",
        "description": "A local folder of SYNTH-shaped parquet files.",
        "storage": {
            "format": "parquet",
            "glob": "*.parquet",
            "total_rows": sum(entry.rows for entry in inputs),
            "shards": shards,
        },
    }
