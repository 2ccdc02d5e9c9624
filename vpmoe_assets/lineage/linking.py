"""Trees that share their bytes with published ones: hard links, and copies where there can be none."""

import errno
import os
import shutil
from pathlib import Path

_NO_LINK = {
    errno.EXDEV,
    errno.EMLINK,  # 65,000 names on ext4
    errno.EPERM,  # no hard links here, or fs.protected_hardlinks and another owner
    errno.EACCES,
    errno.ENOTSUP,
    errno.ENOSYS,
}


def link_file(source: Path, target: Path) -> None:
    """Give a published file one more name; copy it where that cannot be.

    Args:
        source: A sealed file, or a link inside its tree; nothing about it is changed.
        target: New; its directory is made.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError as error:
        if error.errno not in _NO_LINK:
            raise
        if source.is_symlink():
            target.symlink_to(source.readlink())
        else:
            _copy(source, target)


def link_tree(source: Path, target: Path) -> None:
    """Give every file of a published tree one more name below `target`."""
    target.mkdir(parents=True, exist_ok=True)
    for directory, _, names in os.walk(source):
        for name in names:
            path = Path(directory, name)
            link_file(path, target / path.relative_to(source))


def _copy(source: Path, target: Path) -> None:
    """Copy, sharing blocks where the file system can, and bring the copy to the disk."""
    with source.open("rb") as from_file, target.open("wb") as to_file:
        try:
            while os.copy_file_range(from_file.fileno(), to_file.fileno(), 1 << 30):
                pass
        except (OSError, AttributeError):  # not between these files, or not on this system
            from_file.seek(0)
            to_file.seek(0)
            to_file.truncate()
            shutil.copyfileobj(from_file, to_file, 1 << 20)
        to_file.flush()
        os.fsync(to_file.fileno())
