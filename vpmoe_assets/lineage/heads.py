"""The head of a record: the small facts by which it is looked up, without its lists of files.

Reading a record of a thousand files takes some 30 ms, and most questions are about its head. Heads are
remembered in `.work/heads.sqlite` while the file system vouches that the record's file is unchanged; a
record that is not known is read whole, digests and all.
"""

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Self

from pydantic import Field, ValidationError

from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.filememory import FileMemory, Identity, identity, settled
from vpmoe_assets.lineage.layout import Layout, directories, version_name, version_order
from vpmoe_assets.lineage.record import (
    RECORD_NAME,
    Frozen,
    InputRef,
    Origin,
    Record,
    Scalar,
    read_record,
)


class Head(Frozen):
    """What a record is looked up by; fields as in the record.

    Attributes:
        size: Bytes of the payload.
    """

    schema_: Literal["vpmoe.artifact/1", "vpmoe.artifact/2"] = Field(alias="schema")
    experiment: str
    asset: str
    version: str
    sequence: int
    published_utc: str
    started_utc: str
    finished_utc: str
    fingerprint: str
    digest: str
    record_digest: str
    size: int
    inputs: tuple[InputRef, ...]
    metrics: dict[str, Scalar]
    original: Origin | None

    @classmethod
    def of(cls, record: Record) -> Self:
        """Return the head of a record."""
        fields = {name: getattr(record, name) for name in cls.model_fields}
        return cls.model_validate({"schema": fields.pop("schema_"), **fields})


@dataclass(frozen=True)
class Damaged:
    """A version whose record cannot be read."""

    experiment: str
    asset: str
    version: str
    error: RecordError


def newest(heads: Sequence[Head], damaged: Sequence[Damaged]) -> Head | None:
    """Return the version with the highest sequence number, or None.

    Args:
        heads: By sequence.
        damaged: Versions of the same asset whose record cannot be read.

    Raises:
        RecordError: A version that may be newer has an unreadable record; falling back to an older one
            without a word would be worse than stopping.
    """
    latest = heads[-1] if heads else None
    for candidate in damaged:
        if latest is None or version_order(candidate.version) > version_order(latest.version):
            raise candidate.error
    return latest


class Heads:
    """The heads of a store's records.

    Args:
        layout: Of the store.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._memory = FileMemory(layout.work / "heads.sqlite")

    def of_asset(self, experiment: str, asset: str) -> tuple[list[Head], list[Damaged]]:
        """Return every version of an asset, by sequence, and those whose record cannot be read, by name."""
        versions = directories(self._layout.asset(experiment, asset))
        heads, damaged = self._read(experiment, asset, versions)
        return sorted(heads, key=lambda head: head.sequence), damaged

    def of_version(self, experiment: str, asset: str, version: str) -> Head | None:
        """Return the head of one version, or None.

        Raises:
            RecordError: Its record cannot be read.
        """
        heads, damaged = self._read(experiment, asset, [version])
        if damaged:
            raise damaged[0].error
        return heads[0] if heads else None

    def of_files(self, paths: Iterable[Path]) -> tuple[dict[Path, Head], dict[Path, RecordError]]:
        """Return the heads of files with records, wherever they lie, and what is wrong with the others.

        A path without a file is in neither.
        """
        found, errors = self._of_files(map(str, paths))
        return (
            {Path(path): head for path, head in found.items()},
            {Path(path): error for path, error in errors.items()},
        )

    def records(self, paths: Iterable[Path]) -> Iterator[tuple[Path, Record | RecordError]]:
        """Yield what whole records say, or what is wrong with them, and remember their heads.

        A path without a file is passed over.
        """
        learnt: list[tuple[Path, Identity, str]] = []
        for path, known in _identities(paths).items():
            quiet = settled(known)
            try:
                record = read_record(path)
            except FileNotFoundError:
                continue
            except RecordError as error:
                yield path, error
                continue
            if quiet and identity(path.stat()) == known:
                learnt.append((path, known, _text(Head.of(record))))
            yield path, record
        self._memory.keep(learnt)

    def learn(self, record: Record) -> None:
        """Remember a record that this process has just sealed and put into its place."""
        path = self._layout.record(record)
        known = identity(path.stat())
        if settled(known, sealed=True):
            self._memory.keep([(path, known, _text(Head.of(record)))])

    def _of_files(self, paths: Iterable[str]) -> tuple[dict[str, Head], dict[str, RecordError]]:
        files = _identities(paths)
        remembered = self._memory.recall(files)
        heads = {path: head for path, text in remembered.items() if (head := _parsed(text)) is not None}
        damaged: dict[str, RecordError] = {}
        for path, found in self.records(Path(path) for path in files if path not in heads):
            if isinstance(found, RecordError):
                damaged[str(path)] = found
            else:
                heads[str(path)] = Head.of(found)
        return {path: heads[path] for path in files if path in heads}, damaged

    def _read(self, experiment: str, asset: str, versions: Sequence[str]) -> tuple[list[Head], list[Damaged]]:
        # Strings, not paths: of thousands of versions, taking paths apart would cost more than the look.
        parent = str(self._layout.asset(experiment, asset))
        places = {os.path.join(parent, version, RECORD_NAME): version for version in versions}
        # No record: it does not exist for anyone.
        found, errors = self._of_files(places)
        heads: list[Head] = []
        for path, head in found.items():
            if (head.experiment, head.asset, head.version) == (experiment, asset, places[path]):
                heads.append(head)
            else:
                errors[path] = RecordError(f"{path}: is the record of {version_name(head)}")
        damaged = [
            Damaged(experiment, asset, version, errors[path])
            for path, version in places.items()
            if path in errors
        ]
        return heads, damaged


def _identities[P: (str, Path)](paths: Iterable[P]) -> dict[P, Identity]:
    """Return what files are known by; those that are not there are left out."""
    found: dict[P, Identity] = {}
    for path in paths:
        try:
            found[path] = identity(os.stat(path))
        except (FileNotFoundError, NotADirectoryError):
            continue
    return found


def _text(head: Head) -> str:
    return head.model_dump_json(by_alias=True)


def _parsed(text: str) -> Head | None:
    try:
        return Head.model_validate_json(text)
    except ValidationError:  # of another version of this program
        return None
