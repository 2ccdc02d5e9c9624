"""Small files that are there whole or not at all, the way of anything to the disk, and what is removed."""

import contextlib
import errno
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
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
    # Another machine, or container, that shares the file system may have a process of the same number.
    scratch = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}.tmp")
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


def present(directory: Path) -> float:
    """Return the time by the clock of a file system, in seconds since 1970: the server's, not this machine's.

    Args:
        directory: In which a file may be made, for a moment.
    """
    with tempfile.NamedTemporaryFile(dir=directory, prefix=".clock.") as now:
        return os.stat(now.name).st_mtime


_OPEN_ELSEWHERE = (".nfs", ".fuse_hidden")


def remove_tree(path: Path) -> None:
    """Remove a directory and everything in it, as far as the file system lets go of it.

    NFS, and file systems in user space, keep a file that somebody has open in its directory, under a hidden
    name, until it is closed. Such a name stays, and so do the directories above it: that is for the next
    who removes what is left there, and no error.

    Raises:
        OSError: Something else could not be removed.
    """

    def failed(function: Callable[..., Any], name: str, error: BaseException) -> None:
        kept = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.EBUSY)
        if not (kept and all(each.startswith(_OPEN_ELSEWHERE) for each in _files(name))):
            raise error

    shutil.rmtree(path, onexc=failed)


def _files(path: str) -> list[str]:
    """Return the names of the files in a directory and below it, or that of the file itself."""
    if not os.path.isdir(path):
        return [os.path.basename(path)]
    return [name for _, _, names in os.walk(path) for name in names]
