"""The files of one version against its record: what is missing, added, cut or altered."""

import contextlib
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from vpmoe_assets.lineage.digest import FileEntry, hash_files, tree_files
from vpmoe_assets.lineage.errors import UnsafePathError
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.objects import OBJECTS_NAME, ObjectStore
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, Record

Kind = Literal[
    "missing",
    "extra",
    "size",
    "content",
    "unsafe",
    "record",
    "ancestor",
    "rewritten",
    "vanished",
    "statement",
    "witness",
    "fingerprint",
    "sources",
    "manifest",
    "ledger",
    "index",
    "event",
    "check",
    "signature",
]
Severity = Literal["problem", "note"]
Hasher = Callable[[Sequence[Path]], Sequence[str]]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as recorded.

    Attributes:
        kind: `missing`, `extra`, `size` or `content` of a file; `unsafe` (a link out of the tree);
            `record` (unreadable or altered); `ancestor` (an input's record is gone or another);
            `rewritten` and `vanished` (somebody remembers another record, or one that is gone);
            `statement` (what was said about it was altered); `witness` (somebody could not be asked);
            `fingerprint`, `sources` and `manifest` (what the record says of itself, of its snapshot or its
            manifest does not hold); `ledger`, `index` and `event` (a copy says another thing: there, in
            DuckDB, in Dagster); `check` (one that had passed fails); `signature` (it does not verify).
        artifact: `experiment/asset/version`.
        path: Of the file, relative to the version's directory; of an object, relative to the store.
        message: What was expected and what was found.
        severity: A note is worth knowing and explained: nothing is wrong.
    """

    kind: Kind
    artifact: str
    path: str
    message: str
    severity: Severity = "problem"

    def __str__(self) -> str:
        return f"{self.artifact}/{self.path}: {self.message}"

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a dict."""
        fields: dict[str, Any] = asdict(self)
        return fields


def payload_problems(directory: Path, record: Record, hasher: Hasher | None = hash_files) -> list[Problem]:
    """Compare payload and manifest with the record.

    Args:
        directory: Of the version.
        record: What should be there.
        hasher: Returns the sha256 of each file; None compares names and sizes alone.
    """
    problems = _tree_problems(directory, "payload", record, record.files, hasher)
    listed = (
        []
        if record.manifest is None
        else [FileEntry(MANIFEST_NAME, record.manifest.size, record.manifest.sha256)]
    )
    found = {MANIFEST_NAME: directory / MANIFEST_NAME} if (directory / MANIFEST_NAME).is_file() else {}
    return problems + _compare("", record, listed, found, hasher)


def run_problems(directory: Path, record: Record, hasher: Hasher | None = hash_files) -> list[Problem]:
    """Compare the files of `run/` with the record; arguments as for `payload_problems`."""
    return _tree_problems(directory, "run", record, record.run_files, hasher)


def place_problems(directory: Path, record: Record) -> list[Problem]:
    """Return what lies in a version's directory and does not belong there, and what is no more than a link.

    Args:
        directory: Of the version.
        record: Of the version.
    """
    name, found = version_name(record), []
    with contextlib.suppress(FileNotFoundError), os.scandir(directory) as entries:
        for entry in sorted(entries, key=lambda each: each.name):
            if entry.name not in _BELONG:
                found.append(Problem("extra", name, entry.name, "not in the record"))
            elif entry.is_symlink():
                message = f"is a link to {os.readlink(entry.path)}, where anybody may change it unseen"
                found.append(Problem("unsafe", name, entry.name, message))
    return found


_BELONG = frozenset({"payload", "run", MANIFEST_NAME, RECORD_NAME})


def object_problems(root: Path, record: Record, hasher: Hasher | None = hash_files) -> list[Problem]:
    """Compare the objects that a record names with their names.

    Args:
        root: Of the store.
        record: Names them.
        hasher: As for `payload_problems`.
    """
    named = {version_name(record): record.objects.model_dump(exclude_none=True)}
    return list(missing_objects(root, named, hasher))


def missing_objects(
    root: Path, named: Mapping[str, Mapping[str, str]], hasher: Hasher | None
) -> Iterator[Problem]:
    """Yield what is wrong with the objects that versions name, each object looked at once.

    Args:
        root: Of the store.
        named: Objects by role, by version (`experiment/asset/version`).
        hasher: As for `payload_problems`.
    """
    objects = ObjectStore(root)
    there = [sha for sha in {sha for roles in named.values() for sha in roles.values()} if objects.has(sha)]
    digests: dict[str, str] = {}
    if hasher is not None:
        digests = dict(zip(there, hasher([objects.path(sha) for sha in there]), strict=True))
    known = set(there)
    for name, roles in named.items():
        for role, sha256 in roles.items():
            shown = f"{OBJECTS_NAME}/{sha256}"
            if sha256 not in known:
                message = f"missing ({role}): it can no longer be made again from its record"
                yield Problem("missing", name, shown, message)
            elif (digest := digests.get(sha256, sha256)) != sha256:
                yield Problem("content", name, shown, f"sha256 {digest} ({role})")


def _tree_problems(
    directory: Path, area: str, record: Record, listed: Iterable[FileEntry], hasher: Hasher | None
) -> list[Problem]:
    root = directory / area
    try:
        found = dict(tree_files(root)) if root.is_dir() else {}
    except UnsafePathError as error:
        return [Problem("unsafe", version_name(record), area, str(error))]
    return _compare(f"{area}/", record, listed, found, hasher)


def _compare(
    prefix: str, record: Record, listed: Iterable[FileEntry], found: dict[str, Path], hasher: Hasher | None
) -> list[Problem]:
    expected = {entry.path: entry for entry in listed}
    name = version_name(record)
    problems = [
        Problem("extra", name, prefix + path, "not in the record") for path in found.keys() - expected.keys()
    ]
    intact: list[FileEntry] = []
    for path, entry in expected.items():
        if path not in found:
            problems.append(Problem("missing", name, prefix + path, f"missing ({entry.size} bytes expected)"))
        elif (size := found[path].stat().st_size) != entry.size:
            problems.append(Problem("size", name, prefix + path, f"{size} bytes, expected {entry.size}"))
        else:
            intact.append(entry)
    if hasher is not None:
        digests = hasher([found[entry.path] for entry in intact])
        for entry, digest in zip(intact, digests, strict=True):
            if digest != entry.sha256:
                message = f"sha256 {digest}, expected {entry.sha256}"
                problems.append(Problem("content", name, prefix + entry.path, message))
    return sorted(problems, key=lambda problem: problem.path)
