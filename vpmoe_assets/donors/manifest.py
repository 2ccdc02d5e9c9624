"""The manifest of a donor's directory: what is in it, by sha256."""

from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.digest import file_sha256


def donor_manifest(description: str, directory: Path, **more: Any) -> dict[str, Any]:
    """Return what a donor's directory holds, with the sha256 of every file.

    Args:
        description: Of the donor, for people.
        directory: Its files.
        **more: Further keys, such as repository and commit.
    """
    shards = [
        {
            "path": path.relative_to(directory).as_posix(),
            "bytes": path.stat().st_size,
            "sha256": file_sha256(path),
        }
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    ]
    return {
        "schema_version": "donor_v1",
        "description": description,
        **more,
        "storage": {
            "format": "safetensors",
            "total_bytes": sum(shard["bytes"] for shard in shards),
            "shards": shards,
        },
    }
