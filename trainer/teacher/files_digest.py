"""A digest of what is in a directory, where nobody has given one."""

import hashlib
from pathlib import Path

from trainer.contract.canonical import sha256_json


def files_digest(path: Path) -> str:
    """Return a digest of the names and contents of a directory's files; it reads them all.

    Raises:
        FileNotFoundError: There is no such directory, or it is empty.
    """
    files = sorted(file for file in path.rglob("*") if file.is_file())
    if not files:
        raise FileNotFoundError(f"{path} is no directory with files in it; give a payload")
    contents = {}
    for file in files:
        with file.open("rb") as content:
            contents[str(file.relative_to(path))] = hashlib.file_digest(content, "sha256").hexdigest()
    return sha256_json(contents)
