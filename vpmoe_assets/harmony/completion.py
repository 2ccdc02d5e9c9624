"""What a finished shard leaves behind, so that a build that was killed goes on where it stopped.

A shard is written in a scratch directory, its files are moved to their final names, and its record is written
last. A record counts only for the same input and configuration (its key) and only while every file it names
still has the recorded sha256; otherwise the shard is built again.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe_assets.lineage.canonical import canonical_json
from vpmoe_assets.lineage.digest import file_sha256
from vpmoe_assets.lineage.workarea import sync_directory, write_durably


def shard_name(shard: int) -> str:
    """``shard_03``."""
    return f"shard_{shard:02d}"


def write_json(path: Path, document: Mapping[str, Any]) -> None:
    """Write indented JSON so that the file appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, json.dumps(document, indent=2, allow_nan=False).encode() + b"\n")


@dataclass(frozen=True)
class ShardWork:
    """One shard under construction.

    Args:
        shard: its number.
        key: sha256 over everything that decides its bytes.
        payload_dir: where its files go.
        state_dir: where its record, its sidecar files and its scratch directory lie.
    """

    shard: int
    key: str
    payload_dir: Path
    state_dir: Path

    @property
    def scratch(self) -> Path:
        """Directory in which the shard is written; the same relative names as in the payload."""
        return self.state_dir / f"{shard_name(self.shard)}.partial"

    @property
    def record(self) -> Path:
        """The completion record."""
        return self.state_dir / f"{shard_name(self.shard)}.done.json"

    def completed(self) -> dict[str, Any] | None:
        """The result of this shard if it is finished under this key and intact, else None."""
        try:
            record = json.loads(self.record.read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(record, dict) or record.get("key") != self.key:
            return None
        for root, files in ((self.payload_dir, record["files"]), (self.state_dir, record["sidecars"])):
            for name, digest in files.items():
                if not (root / name).is_file() or file_sha256(root / name) != digest:
                    return None
        result: dict[str, Any] = record["result"]
        return result

    def begin(self) -> Path:
        """Forget any earlier record and return the empty scratch directory."""
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)
        if self.scratch.exists():
            shutil.rmtree(self.scratch)
        self.scratch.mkdir()
        return self.scratch

    def finish(self, files: Mapping[str, str], sidecars: Iterable[str], result: Mapping[str, Any]) -> None:
        """Move the shard's files from the scratch directory to their places and write the record.

        Args:
            files: sha256 by path relative to the payload.
            sidecars: names of files that stay in the state directory.
            result: what ``completed`` will return; must be JSON.
        """
        kept = {name: file_sha256(self.scratch / name) for name in sidecars}
        for root, names in ((self.payload_dir, files), (self.state_dir, kept)):
            for name in names:
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                os.replace(self.scratch / name, root / name)
            for directory in {(root / name).parent for name in names}:
                sync_directory(directory)
        shutil.rmtree(self.scratch)
        write_json(self.record, {"key": self.key, "files": files, "sidecars": kept, "result": result})


def shard_key(**fields: Any) -> str:
    """sha256 over the canonical JSON of everything that decides a shard's bytes."""
    return hashlib.sha256(canonical_json(fields)).hexdigest()


def sweep(payload_dir: Path, expected: Iterable[str]) -> None:
    """Remove files of the payload that no shard of this build wrote, as of a build with more shards."""
    wanted = set(expected)
    for path in sorted(payload_dir.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(payload_dir).as_posix() not in wanted:
            path.unlink()
