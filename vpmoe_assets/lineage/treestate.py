"""What a version's directory was when its files were last found intact: one line for all of them.

A record of a thousand files takes longer to read than a thousand files take to look at. So what is remembered
of a version is the digest of how the file system tells its files apart (name, inode, size, times), kept for
its record's file. While both are the same, every file is what it was, and neither record nor contents are
read. No program can set ctime, so every ordinary write is noticed; decay of the medium is not.
"""

import hashlib
import json
import os
import stat
from collections.abc import Iterable
from pathlib import Path

from vpmoe_assets.lineage.filememory import FileMemory, Identity, identity, settled
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import RECORD_NAME, Record


class TreeStates:
    """The states of a store's versions in which their files were found intact.

    Args:
        path: Of the database.
    """

    def __init__(self, path: Path) -> None:
        self._memory = FileMemory(path)
        self._known: dict[Path, tuple[Identity, str]] = {}

    def recall(self, directories: Iterable[Path]) -> None:
        """Look up what is remembered of many versions at once."""
        found: dict[Path, Identity] = {}
        for directory in directories:
            path = directory / RECORD_NAME
            try:
                found[path] = identity(path.stat())
            except OSError:
                continue  # gone meanwhile; whoever reads it says so
        for path, said in self._memory.recall(found).items():
            self._known[path.parent] = (found[path], said)

    def unchanged(self, directory: Path, head: Head) -> dict[str, str] | None:
        """Say whether a version is as it was when its files were found to be what its record says.

        Returns:
            The objects that its record names, by role; None where it has to be looked at.
        """
        known = self._known.get(directory)
        if known is None:
            return None
        try:
            artifact, record, state, objects = json.loads(known[1])
        except ValueError:  # of another version of this program
            return None
        same = (artifact, record) == (version_name(head), head.record_digest)
        return objects if same and TreeState.of(directory).digest == state else None

    def keep(self, intact: Iterable[tuple[Path, Record, "TreeState"]]) -> None:
        """Remember versions whose files were found to be what their records say.

        Args:
            intact: Directory, record, and the state from before the files were read. What has changed
                meanwhile, or may still change unseen, is left out.
        """
        rows = []
        for directory, record, before in intact:
            path = directory / RECORD_NAME
            try:
                known = identity(path.stat())
                quiet = settled(known) and before.quiet and TreeState.of(directory) == before
            except OSError:
                continue
            if quiet:
                objects = record.objects.model_dump(exclude_none=True)
                said = [version_name(record), record.record_digest, before.digest, objects]
                rows.append((path, known, json.dumps(said)))
        self._memory.keep(rows)

    def close(self) -> None:
        """Close the database."""
        self._memory.close()


class TreeState:
    """How a file system tells one state of a directory from another.

    Attributes:
        digest: Of all names, inodes, sizes and times below it.
        changed_ns: When any of them changed last.
    """

    __slots__ = ("changed_ns", "digest")

    def __init__(self, digest: str, changed_ns: int) -> None:
        self.digest = digest
        self.changed_ns = changed_ns

    @classmethod
    def of(cls, directory: Path) -> "TreeState":
        """Look at every name below a directory; links are not followed.

        Raises:
            OSError: It cannot be looked at.
        """
        whole, changed, waiting = hashlib.sha256(), 0, [os.fspath(directory)]
        while waiting:
            place = waiting.pop()
            lines, below = [], []
            with os.scandir(place) as entries:
                for entry in entries:
                    found = entry.stat(follow_symlinks=False)
                    if stat.S_ISDIR(found.st_mode):  # what is in it counts, not when it got there
                        below.append(entry.path)
                        lines.append(f"{entry.name}/")
                        continue
                    changed = max(changed, found.st_mtime_ns, found.st_ctime_ns)
                    lines.append(
                        f"{entry.name}\0{found.st_mode} {found.st_dev} {found.st_ino} {found.st_size} "
                        f"{found.st_mtime_ns} {found.st_ctime_ns}"
                    )
            lines.sort()
            whole.update("\n".join(lines).encode("utf-8", "surrogateescape") + b"\0\0")
            waiting += sorted(below)
        return cls(whole.hexdigest(), changed)

    @property
    def quiet(self) -> bool:
        """Whether every write from now on will change it."""
        return settled((0, 0, 0, self.changed_ns, self.changed_ns))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TreeState) and self.digest == other.digest

    def __hash__(self) -> int:
        return hash(self.digest)
