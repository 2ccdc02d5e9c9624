"""What a user reads where a disk takes nothing more."""

import errno
from collections.abc import Mapping

_REMEDIES: Mapping[int, str] = {
    errno.ENOSPC: "make room there",
    errno.EDQUOT: "make room in your quota there",
    errno.EROFS: "mount it so that it can be written to",
}


def disk_trouble(error: OSError) -> str | None:
    """Return one line that says what to do; None for an error that is not the disk's."""
    remedy = _REMEDIES.get(error.errno or 0)
    if remedy is None:
        return None
    where = f": {error.filename}" if error.filename else ""
    return f"{error.strerror}{where}; {remedy} and run it again: what was finished is kept"
