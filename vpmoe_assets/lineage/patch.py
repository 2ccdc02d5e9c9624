"""The difference between a commit and the sources that ran, as a patch that `git apply` takes.

It is made from the bytes that were read and not from what lies on the disk by now, through an index and an
object directory of its own: git's own files stay as they are.
"""

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from vpmoe_assets.codebase.tree import is_source
from vpmoe_assets.lineage.git import git

_FILE = b"100644"
_PREFIXES = ("--src-prefix=a/", "--dst-prefix=b/")


def source_patch(root: Path, commit: str, content: Mapping[str, bytes]) -> bytes | None:
    """Return what makes the sources of a commit into `content`, new and removed files included.

    Args:
        root: The project: the top of the checkout, or a directory in it. Paths in the patch are from the top.
        commit: Full hash.
        content: Bytes of every source file by its path relative to `root`.

    Returns:
        The patch; None where there is no difference.

    Raises:
        ProvenanceError: git cannot say.
    """
    before = _committed(root, commit)
    sha = hashlib.sha1 if len(commit) == 40 else hashlib.sha256
    entries: dict[str, bytes] = {path: b"0 " + b"0" * len(commit) for path in before if is_source(path)}
    new: list[tuple[str, bytes]] = []
    for path, its in content.items():
        mode, known = before.get(path, (_FILE, b""))
        name = sha(b"blob %d\0" % len(its) + its).hexdigest().encode()
        if (mode in (_FILE, b"100755")) and known == name:
            entries.pop(path, None)
        else:
            entries[path] = (mode if mode == b"100755" else _FILE) + b" " + name
            new.append((path, its))
    return _difference(root, commit, entries, [its for _, its in new]) if entries else None


def _committed(root: Path, commit: str) -> dict[str, tuple[bytes, bytes]]:
    """Return mode and object name of every file of a commit below `root`, by path."""
    listed = git(root, "ls-tree", "-r", "-z", commit).split(b"\0")
    found = {}
    for line in filter(None, listed):
        what, _, path = line.partition(b"\t")
        mode, _, name = what.split(b" ")
        found[os.fsdecode(path)] = (mode, name)
    return found


def _difference(root: Path, commit: str, entries: Mapping[str, bytes], blobs: list[bytes]) -> bytes:
    prefix = git(root, "rev-parse", "--show-prefix").removesuffix(b"\n")
    objects = root / os.fsdecode(git(root, "rev-parse", "--git-path", "objects").removesuffix(b"\n"))
    with TemporaryDirectory(prefix="vpmoe-patch-") as directory:
        scratch = Path(directory)
        (scratch / "objects").mkdir()
        apart = {
            "GIT_INDEX_FILE": str(scratch / "index"),
            "GIT_OBJECT_DIRECTORY": str(scratch / "objects"),
            "GIT_ALTERNATE_OBJECT_DIRECTORIES": str(objects),
        }
        for number, blob in enumerate(blobs):
            (scratch / f"{number}").write_bytes(blob)
        names = "".join(f"{scratch / str(number)}\n" for number in range(len(blobs)))
        git(
            root,
            "hash-object",
            "-w",
            "--no-filters",
            "--stdin-paths",
            stdin=names.encode(),
            environment=apart,
        )
        git(root, "read-tree", commit, environment=apart)
        lines = [what + b"\t" + prefix + os.fsencode(path) + b"\0" for path, what in sorted(entries.items())]
        git(root, "update-index", "-z", "--index-info", stdin=b"".join(lines), environment=apart)
        how = ("--binary", "--full-index", "--no-renames", "--no-color", "--no-ext-diff", "--no-textconv")
        return git(root, "diff-index", "--cached", "-p", *how, *_PREFIXES, commit, environment=apart)
