"""The code of two records as a difference that people can read, from the snapshots in the object store."""

import difflib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from vpmoe_assets.codebase.snapshot import unpack
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.record import Record


@dataclass(frozen=True, slots=True)
class FileEdit:
    """One source file whose bytes differ.

    Attributes:
        path: In the project.
        added: Lines that only the second side has.
        removed: Lines that only the first side has.
        decides: The step's fingerprint sees the change: it is code of the step, and no mere comment.
    """

    path: str
    added: int
    removed: int
    decides: bool


def edits(objects: ObjectStore, old: str, new: str, decide: Iterable[str]) -> tuple[FileEdit, ...]:
    """Return every file that differs between two snapshots, those that decide bytes first.

    Args:
        objects: Of the store.
        old: sha256 of the first snapshot.
        new: sha256 of the second.
        decide: Paths whose fingerprints differ.

    Raises:
        ObjectMissing: A snapshot is gone.
        ObjectDamaged: One is not what its name says.
    """
    decisive = set(decide)
    found = []
    for path, before, after in _pairs(objects, old, new):
        lines = list(difflib.unified_diff(_lines(before), _lines(after), n=0))[2:]
        found.append(
            FileEdit(
                path,
                sum(line.startswith("+") for line in lines),
                sum(line.startswith("-") for line in lines),
                path in decisive,
            )
        )
    return tuple(sorted(found, key=lambda edit: (not edit.decides, edit.path)))


def unified(objects: ObjectStore, old: str, new: str, only: Iterable[str] | None = None) -> Iterator[str]:
    """Yield the lines of a unified difference between two snapshots, as `git diff` writes them.

    Args:
        objects: Of the store.
        old: sha256 of the first snapshot.
        new: sha256 of the second.
        only: Paths to show; all by default.

    Raises:
        ObjectMissing: A snapshot is gone.
        ObjectDamaged: One is not what its name says.
    """
    wanted = None if only is None else set(only)
    for path, before, after in _pairs(objects, old, new):
        if wanted is not None and path not in wanted:
            continue
        yield f"diff --git a/{path} b/{path}"
        if before is None or after is None:
            yield f"{'new' if before is None else 'deleted'} file mode 100644"
        names = (_side("a", path, before), _side("b", path, after))
        for line in difflib.unified_diff(_lines(before), _lines(after), *names):
            yield line.rstrip("\n")
            if not line.endswith("\n"):
                yield r"\ No newline at end of file"


def unified_between(
    objects: ObjectStore, old: Record, new: Record, code: Sequence[FileEdit]
) -> Iterator[str]:
    """Yield the lines of a unified difference of the code of two records.

    Args:
        objects: Of the store.
        old: The first.
        new: The second.
        code: From `edits`; where some of them decide bytes, only those are shown.

    Raises:
        ObjectMissing: A snapshot is gone.
        ObjectDamaged: One is not what its name says.
    """
    if code and old.objects.sources is not None and new.objects.sources is not None:
        decide = [edit.path for edit in code if edit.decides]
        yield from unified(objects, old.objects.sources, new.objects.sources, decide or None)


def _pairs(objects: ObjectStore, old: str, new: str) -> Iterator[tuple[str, bytes | None, bytes | None]]:
    """Yield path and content of each file that differs; None where it is not there."""
    before, after = (unpack(objects.get(each)) for each in (old, new))
    for path in sorted(before.keys() | after.keys()):
        if before.get(path) != after.get(path):
            yield path, before.get(path), after.get(path)


def _side(prefix: str, path: str, content: bytes | None) -> str:
    return "/dev/null" if content is None else f"{prefix}/{path}"


def _lines(content: bytes | None) -> list[str]:
    # At newlines alone, as git does: a form feed or U+2028 inside a line ends none.
    text = (content or b"").decode("utf-8", "replace")
    *whole, rest = text.split("\n")
    return [f"{line}\n" for line in whole] + ([rest] if rest else [])
