"""What a finished shard leaves behind, so that a build that was killed goes on where it stopped.

A shard's files are written at their final place in a payload that nobody sees before it is published, and its
record is written last. A record counts only for the same input and configuration (its key) and only while
every file it names still has the recorded sha256; otherwise the shard is built again. That check is also why
nothing needs to reach the disk before the whole build is published.
"""

import fcntl
import os
import socket
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.files import replace_json, sync
from trainer.contract.json_text import parse_json
from vpmoe_assets.errors import DataError
from vpmoe_assets.lineage.digest import file_sha256

_PATIENCE_S = 600.0
_POLL_S = 0.1


def shard_name(shard: int) -> str:
    """`shard_03`."""
    return f"shard_{shard:02d}"


def shard_key(**fields: Any) -> str:
    """sha256 over the canonical JSON of everything that decides a shard's bytes."""
    return sha256_json(fields)


@dataclass(frozen=True)
class ShardWork:
    """One shard under construction.

    Args:
        shard: Its number.
        key: sha256 over everything that decides its bytes.
        payload_dir: Where its files are.
        state_dir: Where its record and its sidecar files are.
    """

    shard: int
    key: str
    payload_dir: Path
    state_dir: Path

    @property
    def record(self) -> Path:
        """The completion record."""
        return self.state_dir / f"{shard_name(self.shard)}.done.json"

    @contextmanager
    def held(self, patience_s: float = _PATIENCE_S) -> Iterator[None]:
        """Keep everybody else from this shard while the block runs; the lock goes with the process.

        A worker whose machine was given up, or whose build was killed, may live a moment longer than that is
        known: whoever does its work again waits for its end, so that no two write the same files.

        Args:
            patience_s: How long to wait, in seconds.

        Raises:
            DataError: Another process still has it; the message says which.
        """
        self.state_dir.mkdir(parents=True, exist_ok=True)
        path = self.state_dir / f"{shard_name(self.shard)}.lock"
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience_s
        try:
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() >= deadline:
                        who = os.pread(handle, 200, 0).decode(errors="replace") or "another process"
                        raise DataError(
                            f"{path}: shard {self.shard:02d} is held by {who} for {patience_s:g} s now; end "
                            "that process and run this again"
                        ) from None
                    time.sleep(_POLL_S)
            os.ftruncate(handle, 0)
            os.pwrite(handle, f"process {os.getpid()} on {socket.gethostname()}".encode(), 0)
            yield
        finally:
            os.close(handle)

    def completed(self) -> dict[str, Any] | None:
        """Return the result of this shard if it is finished under this key and intact, else None."""
        try:
            record = parse_json(self.record.read_text())
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

    def begin(self) -> None:
        """Make the directories and forget any earlier record."""
        self.payload_dir.mkdir(parents=True, exist_ok=True)
        self.state_dir.mkdir(parents=True, exist_ok=True)
        self.record.unlink(missing_ok=True)

    def finish(self, files: Mapping[str, str], sidecars: Iterable[str], result: Mapping[str, Any]) -> None:
        """Write the record.

        Args:
            files: sha256 by path relative to the payload.
            sidecars: Names of files in the state directory.
            result: What `completed` will return; must be JSON.
        """
        kept = {name: file_sha256(self.state_dir / name) for name in sidecars}
        replace_json(
            self.record, {"key": self.key, "files": files, "sidecars": kept, "result": result}, durable=False
        )


def sweep(payload_dir: Path, expected: Iterable[str]) -> None:
    """Remove files of the payload that no shard of this build wrote, as of a build with more shards."""
    wanted = set(expected)
    for path in sorted(payload_dir.rglob("*"), reverse=True):
        if path.is_dir():
            if not any(path.iterdir()):
                path.rmdir()
        elif path.relative_to(payload_dir).as_posix() not in wanted:
            path.unlink()


def sync_tree(root: Path) -> None:
    """Bring every file and directory below `root`, and `root` itself, to the disk."""
    paths = [root, *root.rglob("*")]
    with ThreadPoolExecutor(32) as pool:  # they only wait: together they take little longer than one
        list(pool.map(sync, paths))
