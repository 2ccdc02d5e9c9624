"""A snapshot of the sources: one archive that any machine can lay out again, byte for byte.

The archive is a gzipped tar of regular files, sorted, with no times, owners or modes of their own, so equal
sources make equal archives. Laid out, it is a directory that programs run from: its files are read-only, its
directories are not, so that Python keeps its bytecode there and the next job does not compile anew.
"""

import gzip
import io
import logging
import os
import secrets
import shutil
import tarfile
import zlib
from collections.abc import Mapping
from pathlib import Path, PurePosixPath

from vpmoe_assets.errors import DataError

_BYTECODE = "__pycache__"

_log = logging.getLogger(__name__)


_UNREADABLE = (
    tarfile.TarError,
    EOFError,
    OSError,
    ValueError,
    OverflowError,
    RecursionError,  # of a header of a header of a header, and so on
    zlib.error,
)
_MOST_BYTES = 256 << 20
"""Of all sources together; this project's are a few."""


class SnapshotError(DataError):
    """An archive is none of sources, or cannot be laid out; the message says why."""


def pack(content: Mapping[str, bytes]) -> bytes:
    """Return the archive of a set of files.

    Args:
        content: Bytes of each file by its path, relative, with `/`.
    """
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(content):
            member = tarfile.TarInfo(_plain(path))
            member.size, member.mode = len(content[path]), 0o444
            archive.addfile(member, io.BytesIO(content[path]))
    return gzip.compress(plain.getvalue(), 6, mtime=0)  # 9 takes twice as long, for half a percent


def unpack(archive: bytes) -> dict[str, bytes]:
    """Return the files of an archive, by path.

    Raises:
        SnapshotError: It is no such archive, or holds anything but regular files with plain relative paths.
    """
    content: dict[str, bytes] = {}
    try:
        # Decompressed as a whole, which compares its checksum, before any of it is read.
        with gzip.GzipFile(fileobj=io.BytesIO(archive)) as packed:
            plain = packed.read(_MOST_BYTES + 1)
        if len(plain) > _MOST_BYTES:
            raise SnapshotError(
                f"an archive of sources unpacks to at most {_MOST_BYTES} bytes, and this one to more"
            )
        with tarfile.open(fileobj=io.BytesIO(plain), mode="r:") as opened:
            for member in opened:
                # A sparse one says how many zeros it holds, and they would all be made.
                whole = member.isreg() and not member.issparse()
                file = opened.extractfile(member) if whole else None
                if file is None or member.name in content:
                    raise SnapshotError(
                        f"an archive of sources holds regular files, once each, and this one {member.name!r}"
                    )
                content[_plain(member.name)] = file.read()
    except SnapshotError:
        raise
    except _UNREADABLE as error:
        raise SnapshotError(f"not an archive of sources: {error}") from error
    return content


def lay_out(archive: bytes, directory: Path) -> None:
    """Make `directory` hold the files of an archive and nothing else, bytecode apart.

    It appears complete or not at all, and several processes may ask for it at once. What lies there already
    is compared, every byte; a directory in which something was changed, removed or added is replaced.

    Args:
        archive: From `pack`.
        directory: Where; its parent is made.

    Raises:
        SnapshotError: The archive is damaged, or `directory` cannot be made as it must be.
    """
    content = unpack(archive)
    for _ in range(2):
        if not os.path.lexists(directory):
            _appear(content, directory)
        if (wrong := _difference(content, directory)) is None:
            return
        _log.warning("%s is not what was laid out there (%s); laid out again", directory, wrong)
        _vanish(directory)
    raise SnapshotError(f"{directory} cannot be laid out: {wrong}")


def _plain(path: str) -> str:
    pure = PurePosixPath(path)
    if not path or str(pure) != path or pure.is_absolute() or ".." in pure.parts or "\0" in path:
        raise SnapshotError(f"{path!r} is no plain path of a source file (relative, no '..')")
    return path


def _appear(content: Mapping[str, bytes], directory: Path) -> None:
    directory.parent.mkdir(parents=True, exist_ok=True)
    scratch = _beside(directory)
    try:
        for path, its in content.items():
            target = scratch / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with os.fdopen(os.open(target, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o444), "wb") as file:
                file.write(its)
        try:
            scratch.rename(directory)
        except OSError:
            if not directory.is_dir():  # else another process was first
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _vanish(directory: Path) -> None:
    trash = _beside(directory)
    try:
        directory.rename(trash)
    except FileNotFoundError:  # another process was first
        return
    if trash.is_dir() and not trash.is_symlink():
        shutil.rmtree(trash)
    else:
        trash.unlink()


def _beside(directory: Path) -> Path:
    return directory.with_name(f".{directory.name}.{secrets.token_hex(8)}")


def _difference(content: Mapping[str, bytes], directory: Path) -> str | None:
    """Say what is wrong with a directory, None where it holds those files alone."""
    if directory.is_symlink() or not directory.is_dir():
        return "not a directory"
    left = dict(content)
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if name != _BYTECODE]
        for name in (*names, *(name for name in directories if os.path.islink(os.path.join(parent, name)))):
            file = Path(parent, name)
            path = file.relative_to(directory).as_posix()
            if path not in left:
                return f"{path} does not belong there"
            if file.is_symlink() or file.read_bytes() != left.pop(path):
                return f"{path} was changed"
    return f"{min(left)} is missing" if left else None
