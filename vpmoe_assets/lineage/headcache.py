"""The heads of a store's records, remembered.

Reading a record of a thousand files takes some 30 ms, and most questions are about its head. Heads are
remembered in `.work/heads.sqlite` while the file system vouches that the record's file is unchanged; a
record that is not known is read whole, digests and all. Those of an asset are remembered together as well,
by its directory: of thousands of versions a page shows a few, and only those are parsed.
"""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple, Self

import orjson
from pydantic import ValidationError

from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.filememory import FileMemory, Identity, identity, settled
from vpmoe_assets.lineage.heads import Damaged, Head, Versions
from vpmoe_assets.lineage.layout import Layout, directories, version_name
from vpmoe_assets.lineage.record import RECORD_NAME, InputRef, Origin, Record, read_record

_SHAPE = [sorted(model.model_fields) for model in (Head, InputRef, Origin)]
"""What a head is made of: those that another version of this program remembered are read again."""


class _Line(NamedTuple):
    """What is known of a version before its head is parsed.

    Attributes:
        version: Its name.
        known: What the file of its record is known by.
        sequence: Its number.
        record_digest: 64 hex digits.
        own_size: Bytes of payload that no version had before it.
        text: The head, as JSON.
    """

    version: str
    known: Identity
    sequence: int
    record_digest: str
    own_size: int
    text: str

    @classmethod
    def of(cls, head: Head, known: Identity) -> Self:
        """Return what is remembered of a head."""
        return cls(head.version, known, head.sequence, head.record_digest, head.own_size, _text(head))

    def says(self, head: Head) -> bool:
        """Whether a head is the one that is meant."""
        said = head.version, head.sequence, head.record_digest, head.own_size
        return said == (self.version, self.sequence, self.record_digest, self.own_size)


class Heads:
    """The heads of a store's records.

    Args:
        layout: Of the store.
    """

    def __init__(self, layout: Layout) -> None:
        self._layout = layout
        self._memory = FileMemory(layout.work / "heads.sqlite")

    def of_asset(self, experiment: str, asset: str) -> tuple[Versions, list[Damaged]]:
        """Return every version of an asset, by sequence, and those whose record cannot be read, by name."""
        directory = self._layout.asset(experiment, asset)
        files = _records_in(str(directory), directories(directory))
        lines = [line for line in self._shelf(directory) if files.get(line.version) == line.known]
        heads, damaged = self._read(
            experiment, asset, sorted(files.keys() - {line.version for line in lines})
        )
        found = [_Line.of(head, files[head.version]) for head in heads]
        if any(settled(line.known) for line in found):
            self._keep_shelf(directory, [line for line in [*lines, *found] if settled(line.known)])
        read = {head.version: head for head in heads}
        return Versions(
            (line.record_digest, line.own_size, read.get(line.version) or partial(_head_of, directory, line))
            for line in sorted([*lines, *found], key=lambda line: line.sequence)
        ), damaged

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

    def _shelf(self, directory: Path) -> list[_Line]:
        """Return what is remembered of the versions in a directory, each to be held against its file."""
        text = self._memory.recall(_identities([directory])).get(directory)
        if text is None:
            return []
        first, *heads = text.split("\n")
        try:
            shape, *lines = orjson.loads(first)
            if shape != _SHAPE:
                return []
            return [
                _Line(version, (*known,), sequence, digest, size, head)
                for (version, known, sequence, digest, size), head in zip(lines, heads, strict=True)
            ]
        except (ValueError, TypeError):  # torn, or a line of another kind
            return []

    def _keep_shelf(self, directory: Path, lines: Sequence[_Line]) -> None:
        # No line break is in a head's JSON, and to take its text out of another JSON would cost a page.
        text = "\n".join(
            [json.dumps([_SHAPE, *(line[:-1] for line in lines)]), *(line.text for line in lines)]
        )
        self._memory.keep((path, known, text) for path, known in _identities([directory]).items())

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


def _records_in(directory: str, versions: Iterable[str]) -> dict[str, Identity]:
    """Return what the records of versions are known by; those without one are left out."""
    # Strings, not paths: of thousands of versions, taking paths apart would cost more than the look.
    places = _identities(f"{directory}/{version}/{RECORD_NAME}" for version in versions)
    start, end = len(directory) + 1, -len(RECORD_NAME) - 1
    return {place[start:end]: known for place, known in places.items()}


def _head_of(directory: Path, line: _Line) -> Head:
    """Return the head that is remembered, or what the record says where that is another one."""
    head = _parsed(line.text)
    if head is not None and line.says(head) and (head.experiment, head.asset) == directory.parts[-2:]:
        return head
    return Head.of(read_record(directory / line.version / RECORD_NAME))


def _text(head: Head) -> str:
    return head.model_dump_json(by_alias=True)


def _parsed(text: str) -> Head | None:
    try:
        return Head.model_validate_json(text)
    except ValidationError:  # of another version of this program
        return None
