"""Small files that are there whole or not at all, and the way of anything to the disk."""

import contextlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any


def replace_bytes(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a small file so that a reader, or a crash, sees the old content or the new and never a part.

    Args:
        path: File to create or replace; its directory must exist.
        content: New content.
        durable: Wait until it is on the disk, name and all. Without it a power cut may leave the old file
            or an empty one: for what is brought to the disk later, or is worth nothing after a crash.
    """
    scratch = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with removed_on_error(scratch):
        with scratch.open("wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        scratch.replace(path)
    if durable:
        sync(path.parent)


@contextlib.contextmanager
def removed_on_error(path: Path) -> Iterator[None]:
    """Leave no file at a path where the block does not end well: on a full disk it would only take room."""
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):  # the reader is told of what went wrong first
            path.unlink(missing_ok=True)
        raise


def replace_text(path: Path, text: str, *, durable: bool = True) -> None:
    """Write a small text file, UTF-8, as `replace_bytes` does."""
    replace_bytes(path, text.encode("utf-8"), durable=durable)


def replace_json(path: Path, document: Mapping[str, Any], *, durable: bool = True) -> None:
    """Write a small JSON file for people, keys in their own order, as `replace_bytes` does.

    Raises:
        ValueError: A float is NaN or infinite.
    """
    replace_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n", durable=durable)


def sync(path: Path) -> None:
    """Bring the content of a file, or the names in a directory, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
