"""Content digests: sha256 of files, and one Merkle root for a tree of them.

The root is the Merkle tree hash of RFC 6962 (leaves hashed with prefix byte 0, inner nodes with prefix byte
1, so that no leaf can pass for a node) over the leaves `[path, size, sha256]` as canonical JSON, sorted
by the UTF-8 bytes of the path. It depends on names and bytes alone: not on times, modes, owners or the
order of listing.
"""

import hashlib
import os
import stat
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from trainer.contract.canonical import canonical_json
from vpmoe_assets.lineage.errors import UnsafePathError

HASH_THREADS = min(8, os.cpu_count() or 1)


@dataclass(frozen=True, slots=True, order=True)
class FileEntry:
    """One file of a tree.

    Attributes:
        path: Relative to the tree, with `/`.
        size: Bytes.
        sha256: Of the contents, in hex.
    """

    path: str
    size: int
    sha256: str


def file_sha256(path: Path) -> str:
    """Return the sha256 of a file, in hex; reads it once, in constant memory, without holding the GIL."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(files: Sequence[Path], hasher: Callable[[Path], str] = file_sha256) -> list[str]:
    """Return the sha256 of each file, in hex, several read at a time."""
    if len(files) < 2:
        return [hasher(file) for file in files]
    with ThreadPoolExecutor(HASH_THREADS) as pool:
        return list(pool.map(hasher, files))


def safe_relative(path: str) -> str:
    """Return `path` if it names a file inside a tree.

    Raises:
        UnsafePathError: For an absolute path, an empty one, one with `.` or `..`, a NUL, or no UTF-8
            form.
    """
    try:
        path.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UnsafePathError(f"file name {path!r} is not valid UTF-8; rename the file") from error
    if "\0" in path or not {"", ".", ".."}.isdisjoint(path.split("/")):
        raise UnsafePathError(f"path {path!r} is not a plain path inside an artifact (relative, no '..')")
    return path


def tree_files(root: Path) -> Iterator[tuple[str, Path]]:
    """Yield `(relative path, real path)` of every file below `root`, in no particular order.

    Relative symlinks to files of the same tree are followed; empty directories do not count.

    Raises:
        UnsafePathError: For a symlink that is absolute, leaves the tree, dangles or points at a directory,
            for
            devices, pipes and sockets, and for names that are not UTF-8.
    """
    top = os.path.realpath(root)
    stack = [top]
    while stack:
        with os.scandir(stack.pop()) as entries:
            for entry in entries:
                relative = entry.path[len(top) + 1 :]
                if entry.is_symlink():
                    yield safe_relative(relative), _inside(top, entry.path, relative)
                elif entry.is_dir(follow_symlinks=False):
                    stack.append(entry.path)
                elif entry.is_file(follow_symlinks=False):
                    yield safe_relative(relative), Path(entry.path)
                else:
                    kind = stat.filemode(entry.stat(follow_symlinks=False).st_mode)[0]
                    raise UnsafePathError(
                        f"{root / relative}: only regular files can be published (kind {kind!r})"
                    )


def _inside(top: str, link: str, relative: str) -> Path:
    target = os.readlink(link)
    real = os.path.realpath(link)
    if os.path.isabs(target) or not real.startswith(top + os.sep):
        raise UnsafePathError(f"symlink {relative!r} -> {target!r} leaves {top}; copy the file instead")
    if not os.path.isfile(real):
        raise UnsafePathError(f"symlink {relative!r} -> {target!r} does not point at a file of {top}")
    return Path(real)


def scan_tree(root: Path, hasher: Callable[[Path], str] = file_sha256) -> list[FileEntry]:
    """Hash every file below `root`, several at a time.

    Args:
        root: An existing directory.
        hasher: Returns the sha256 of one file; called from several threads.

    Returns:
        Entries sorted by path.

    Raises:
        FileNotFoundError: `root` is not a directory.
        UnsafePathError: See `tree_files`.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"no directory at {root}")
    found = list(tree_files(root))
    digests = hash_files([real for _, real in found], hasher)
    entries = [
        FileEntry(path, real.stat().st_size, digest)
        for (path, real), digest in zip(found, digests, strict=True)
    ]
    return sorted(entries, key=_order)


def merkle_root(entries: Iterable[FileEntry]) -> str:
    """Return the Merkle root, in hex, of a set of files in any order.

    Raises:
        UnsafePathError: A path occurs twice or is not a plain relative one.
    """
    ordered = sorted(entries, key=_order)
    for before, after in pairwise(ordered):
        if before.path == after.path:
            raise UnsafePathError(f"path {after.path!r} occurs twice in one tree")
    level = [
        hashlib.sha256(
            b"\0" + canonical_json([safe_relative(e.path), e.size, e.sha256]).encode("ascii")
        ).digest()
        for e in ordered
    ]
    if not level:
        return hashlib.sha256(b"").hexdigest()
    # Pairing neighbours level by level and carrying an odd last node up unchanged gives the same tree as
    # RFC 6962's recursive split at the largest power of two, without recursion.
    while len(level) > 1:
        paired = [
            hashlib.sha256(b"\1" + level[i] + level[i + 1]).digest() for i in range(0, len(level) - 1, 2)
        ]
        level = paired + level[len(paired) * 2 :]
    return level[0].hex()


def _order(entry: FileEntry) -> bytes:
    return entry.path.encode("utf-8", "surrogatepass")
