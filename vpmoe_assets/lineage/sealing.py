"""Published files are for reading: the mode that the umask gives, without write, whatever wrote them.

Some writers leave files that only their owner can read (a temporary file moved into place); a published file
has one mode with all others. What has another name elsewhere in the store is sealed already, and is left
alone: a mode belongs to the bytes, not to the name.
"""

import os
import shutil
import stat
import threading
from pathlib import Path

from trainer.contract.files import removed_on_error, sync

_PROBE = ".mode"


def seal(root: Path) -> None:
    """Make every file below a directory of this process read-only, for everyone whom the umask lets read.

    Directories stay writable for their owner, so that `rm -r` removes a version.

    Args:
        root: Made by this process, with the mode that the umask gives a directory.
    """
    mode, directory_mode = _given_mode(root), stat.S_IMODE(root.stat().st_mode)
    for directory, _, names in os.walk(root):
        _change(Path(directory), directory_mode)
        for name in names:
            path = Path(directory, name)
            status = path.lstat()
            if not stat.S_ISREG(status.st_mode):
                continue
            if status.st_nlink > 1:
                if not status.st_mode & 0o222:
                    continue
                _part(path)
            _change(path, mode)


def unseal(root: Path) -> None:
    """Let the owner write again to what is below `root`, except to what has another name elsewhere."""
    for directory, _, names in os.walk(root):
        for name in names:
            path = Path(directory, name)
            status = path.lstat()
            if stat.S_ISREG(status.st_mode) and status.st_nlink == 1:
                _change(path, stat.S_IMODE(status.st_mode) | stat.S_IWUSR)


def write_sealed(path: Path, content: bytes) -> None:
    """Write a small file that is read-only from then on; it is there whole or not at all, and on the disk."""
    scratch = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}.tmp")
    with removed_on_error(scratch):
        with scratch.open("wb") as file:
            file.write(content)
            os.fchmod(file.fileno(), stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o444)
            file.flush()
            os.fsync(file.fileno())
        scratch.replace(path)
    sync(path.parent)


def _given_mode(directory: Path) -> int:
    """Return the mode of published files: what a new file in `directory` gets, without write and execute."""
    probe = directory / _PROBE
    with removed_on_error(probe), probe.open("wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode) & 0o444
    probe.unlink()
    return mode


def _change(path: Path, mode: int) -> None:
    if stat.S_IMODE(path.stat().st_mode) != mode:
        os.chmod(path, mode)


def _part(path: Path) -> None:
    """Give a file contents of its own, so that nobody writes to it through another name."""
    scratch = path.with_name(f".{path.name}.own")
    with removed_on_error(scratch):
        shutil.copyfile(path, scratch)
        scratch.replace(path)
