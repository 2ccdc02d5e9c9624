"""Zip files made elsewhere: what may go wrong with one, and a member of it within bounds."""

import struct
import zipfile
import zlib

from vpmoe_assets.errors import DataError

UNREADABLE = (
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
    OSError,
    EOFError,
    ValueError,
    OverflowError,
    NotImplementedError,
    RuntimeError,
)
"""What Python raises at a zip file that is damaged, encrypted, or lies about itself."""
MOST_MEMBER_BYTES = 256 << 20


def read_member(archive: zipfile.ZipFile, name: str) -> bytes:
    """Return a member's bytes.

    Raises:
        DataError: There is none of that name, or it unpacks to more than `MOST_MEMBER_BYTES`.
        UNREADABLE: It is damaged.
    """
    try:
        member = archive.getinfo(name)
    except KeyError:
        raise DataError(f"{archive.filename} lacks {name}") from None
    if member.file_size > MOST_MEMBER_BYTES:
        raise DataError(
            f"{archive.filename}: {name} unpacks to {member.file_size} bytes, at most {MOST_MEMBER_BYTES} "
            "are read; it is not the file that was published"
        )
    return archive.read(member)  # never more than it says of itself
