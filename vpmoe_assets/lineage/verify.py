"""Is every file still what it was? Compare a published artifact, and all it came from, with the records."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from vpmoe_assets.lineage.digest import HASH_THREADS, FileEntry, file_sha256, tree_files
from vpmoe_assets.lineage.errors import RecordError, UnsafePathError
from vpmoe_assets.lineage.record import MANIFEST_NAME, RECORD_NAME, Record, read_record

if TYPE_CHECKING:
    from vpmoe_assets.lineage.store import Store

Kind = Literal["missing", "extra", "size", "content", "unsafe", "record", "ancestor"]
Hasher = Callable[[Path], str]


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as recorded.

    Attributes:
        kind: `missing`, `extra`, `size` or `content` of a file; `unsafe` (a link out of the tree);
            `record` (unreadable or altered); `ancestor` (an input's record is gone or another).
        artifact: `experiment/asset/version`.
        path: Of the file, relative to the version's directory.
        message: What was expected and what was found.
    """

    kind: Kind
    artifact: str
    path: str
    message: str

    def __str__(self) -> str:
        return f"{self.artifact}/{self.path}: {self.message}"

    def to_dict(self) -> dict[str, str]:
        """Return the fields as a dict."""
        fields: dict[str, Any] = asdict(self)
        return fields


def payload_problems(directory: Path, record: Record, hasher: Hasher | None = file_sha256) -> list[Problem]:
    """Compare payload and manifest with the record.

    Args:
        directory: Of the version.
        record: What should be there.
        hasher: Returns a file's sha256; None compares names and sizes alone.
    """
    problems = _tree_problems(directory, "payload", record, record.files, hasher)
    listed = (
        []
        if record.manifest is None
        else [FileEntry(MANIFEST_NAME, record.manifest.size, record.manifest.sha256)]
    )
    found = {MANIFEST_NAME: directory / MANIFEST_NAME} if (directory / MANIFEST_NAME).is_file() else {}
    return problems + _compare("", record, listed, found, hasher)


def run_problems(directory: Path, record: Record, hasher: Hasher | None = file_sha256) -> list[Problem]:
    """Compare the files of `run/` with the record; arguments as for `payload_problems`."""
    return _tree_problems(directory, "run", record, record.run_files, hasher)


def verify_record(
    store: Store, record: Record, deep: bool = True, seen: set[str] | None = None
) -> list[Problem]:
    """Verify one artifact and its whole ancestry; reads every byte, never the digest cache.

    Args:
        store: Where it lies.
        record: As read from the store, or as remembered from elsewhere (then the one on disk must equal it).
        deep: False compares names and sizes of files and the digests of records, and reads no payload.
        seen: Record digests that need no second look; pass one set to verify several artifacts together.

    Returns:
        Problems, the artifact's own first; empty when everything is what it was.
    """
    seen = set() if seen is None else seen
    problems: list[Problem] = []
    queue = [record]
    while queue:
        current = queue.pop(0)
        if current.record_digest in seen:
            continue
        seen.add(current.record_digest)
        directory = store.directory(current)
        problems += _record_problems(directory, current)
        hasher = file_sha256 if deep else None
        problems += payload_problems(directory, current, hasher)
        problems += run_problems(directory, current, hasher)
        for reference in current.inputs:
            path = (
                store.version_directory(current.experiment, reference.asset, reference.version) / RECORD_NAME
            )
            try:
                parent = read_record(path)
            except FileNotFoundError:
                message = f"made from {reference.asset}@{reference.version}, which is no longer in the store"
                problems.append(Problem("ancestor", _name(current), RECORD_NAME, message))
                continue
            except RecordError as error:
                problems.append(Problem("ancestor", _name(current), RECORD_NAME, str(error)))
                continue
            if (parent.record_digest, parent.digest) != (reference.record_digest, reference.digest):
                message = (
                    f"made from {reference.asset}@{reference.version} with record digest "
                    f"{reference.record_digest}, but the record there has {parent.record_digest}"
                )
                problems.append(Problem("ancestor", _name(current), RECORD_NAME, message))
            queue.append(parent)
    return problems


def _record_problems(directory: Path, record: Record) -> list[Problem]:
    try:
        found = read_record(directory / RECORD_NAME).record_digest
    except FileNotFoundError:
        return [Problem("missing", _name(record), RECORD_NAME, "missing")]
    except RecordError as error:
        return [Problem("record", _name(record), RECORD_NAME, str(error))]
    if found != record.record_digest:
        message = f"record digest {found}, expected {record.record_digest}"
        return [Problem("record", _name(record), RECORD_NAME, message)]
    return []


def _tree_problems(
    directory: Path, area: str, record: Record, listed: Iterable[FileEntry], hasher: Hasher | None
) -> list[Problem]:
    root = directory / area
    try:
        found = dict(tree_files(root)) if root.is_dir() else {}
    except UnsafePathError as error:
        return [Problem("unsafe", _name(record), area, str(error))]
    return _compare(f"{area}/", record, listed, found, hasher)


def _compare(
    prefix: str, record: Record, listed: Iterable[FileEntry], found: dict[str, Path], hasher: Hasher | None
) -> list[Problem]:
    expected = {entry.path: entry for entry in listed}
    name = _name(record)
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
    if hasher is not None and intact:
        with ThreadPoolExecutor(HASH_THREADS) as pool:
            for entry, digest in zip(
                intact, pool.map(hasher, (found[entry.path] for entry in intact)), strict=True
            ):
                if digest != entry.sha256:
                    message = f"sha256 {digest}, expected {entry.sha256}"
                    problems.append(Problem("content", name, prefix + entry.path, message))
    return sorted(problems, key=lambda problem: problem.path)


def _name(record: Record) -> str:
    return f"{record.experiment}/{record.asset}/{record.version}"
