"""The files of a payload against what a manifest states of them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.verdict import Verdict


def source_files_match(payload_dir: Path, manifest: dict[str, Any]) -> Verdict:
    """Check that the files of a source are exactly those of its manifest: names, bytes, sha256."""
    storage = manifest["storage"]
    shards = [*storage["shards"], *([storage["table"]] if "table" in storage else [])]
    faults = file_faults(payload_dir, {shard["path"]: (shard["bytes"], shard["sha256"]) for shard in shards})
    return Verdict.of(faults, f"{len(shards)} files as the manifest says", {"files": len(shards)})


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
