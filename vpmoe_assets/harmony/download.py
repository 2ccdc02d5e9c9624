"""The SYNTH parquet files of a pinned commit."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from vpmoe_assets.hub import HubClient, HuggingFaceHub, fetch, require_commit, select_files


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
