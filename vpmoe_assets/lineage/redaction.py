"""The files beside a payload lose their credentials before they are published."""

import re
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from trainer.contract.credentials import redacted_lines, secret_values
from trainer.contract.status import CHECKPOINTS_NAME

_BINARY_SAMPLE = 8192
_BLOCK = 1 << 20


def redact_files(root: Path, scratch: Path) -> tuple[list[str], list[str]]:
    """Remove credentials from the text files below `root`, line by line, and binary files that hold one.

    As strict as `find_credential`: a log that mentions a token keeps its wording. A file with a NUL byte near
    its beginning is no text, cannot be rewritten, and is taken away where a known secret stands in it (a run
    file of Weights & Biases, an archive of logs); resume checkpoints hold tensors and are not searched. Nor
    are links.

    Args:
        root: Directory to search.
        scratch: Directory on the same file system, for a file that is being rewritten.

    Returns:
        Paths relative to `root`, sorted: of the files that were rewritten, and of those that were removed.
    """
    secrets = secret_values()
    changed, removed = [], []
    for path in sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink()):
        name = path.relative_to(root).as_posix()
        if _is_binary(path):
            if not name.startswith(f"{CHECKPOINTS_NAME}/") and _holds(path, secrets):
                path.unlink()
                removed.append(name)
        elif any(safe != line for line, safe in _lines(path, secrets)):
            safer = scratch / "redacted.tmp"
            with safer.open("w", encoding="utf-8", errors="surrogateescape", newline="") as file:
                file.writelines(safe for _, safe in _lines(path, secrets))
            shutil.copystat(path, safer)
            safer.replace(path)
            changed.append(name)
    return changed, removed


def _is_binary(path: Path) -> bool:
    with path.open("rb") as file:
        return b"\0" in file.read(_BINARY_SAMPLE)


def _lines(path: Path, secrets: Sequence[str]) -> Iterator[tuple[str, str]]:
    with path.open(encoding="utf-8", errors="surrogateescape", newline="") as file:
        yield from redacted_lines(file, secrets)


def _holds(path: Path, secrets: Sequence[str]) -> bool:
    """Whether a known secret stands in a file of any size."""
    if not secrets:
        return False
    encoded = [secret.encode(errors="surrogateescape") for secret in secrets]
    any_of_them, overlap = re.compile(b"|".join(map(re.escape, encoded))), max(map(len, encoded))
    with path.open("rb") as file:
        before = b""
        while block := file.read(_BLOCK):
            if any_of_them.search(before + block):
                return True
            before = (before + block)[-overlap:]
    return False
