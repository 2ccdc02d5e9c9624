"""What is input where a folder or a pattern is given: one rule for conversations and for text.

Files whose name begins with a dot, or that lie in such a folder, are none, as with a shell's `*`, Arrow and
Spark: backups of editors, checkpoints of notebooks, the `._…` files that macOS leaves on other file systems.
Neither is what a system keeps beside people's files (`SYSTEM_FOLDERS`). A file named outright is taken.
"""

import glob
from collections.abc import Iterable, Sequence
from pathlib import Path, PurePath

from vpmoe_assets.errors import DataError

TEXT_SUFFIXES = (".jsonl", ".txt")
"""Files of plain text."""

SYSTEM_FOLDERS = frozenset({"$RECYCLE.BIN", "@eaDir", "System Volume Information", "__MACOSX", "lost+found"})
"""Folders in which systems keep what was deleted, found or derived."""


def input_files(root: Path, suffixes: Sequence[str], *, deep: bool) -> list[Path]:
    """Return the input files of a folder, in the order of their paths.

    Args:
        root: The folder; how it is called itself does not count.
        suffixes: Endings of names, such as `.parquet`.
        deep: Whether the folders in it count too.

    Raises:
        DataError: Something with such a name is no file that could be read, or has a name that is not UTF-8.
    """
    candidates = root.rglob("*") if deep else root.glob("*")
    named = (path for path in candidates if path.name.endswith(tuple(suffixes)))
    chosen = sorted(path for path in named if not _passed_over(path.relative_to(root).parts))
    return _readable(path for path in chosen if not (deep and path.is_dir()))


def matching_files(pattern: str) -> list[Path]:
    """Return the files that a pattern matches, in the order of their paths; `**` is any number of folders.

    Raises:
        DataError: As `input_files`.
    """
    asked = set(PurePath(pattern).parts)
    found = sorted(Path(match) for match in glob.glob(pattern, recursive=True))
    return _readable(path for path in found if not SYSTEM_FOLDERS.intersection(set(path.parts) - asked))


def require_named(path: Path) -> None:
    """Refuse a file whose name no manifest can hold.

    Raises:
        DataError: The name is not UTF-8.
    """
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(
            f"{str(path)!r}: the name is not valid UTF-8, and no manifest can hold it; rename the file"
        ) from None


def _passed_over(parts: Iterable[str]) -> bool:
    return any(part.startswith(".") or part in SYSTEM_FOLDERS for part in parts)


def _readable(paths: Iterable[Path]) -> list[Path]:
    files = list(paths)
    for path in files:
        require_named(path)
        if not path.is_file():
            what = (
                "a folder: give it by its own name, or move it"
                if path.is_dir()
                else "a link that leads nowhere: mend or remove it"
                if path.is_symlink()
                else "no regular file: remove it, or give the files by name"
            )
            raise DataError(f"{path} is {what}")
    return files
