"""The states in which published versions were found intact: one line for all files of a version.

A record of a thousand files takes longer to read than a thousand files take to look at. So what is remembered
of a version is the state of its directory, kept for its record's file. While both are the same, every file is
what it was, and neither record nor contents are read.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.filememory import FileMemory, Identity, identity, settled
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import RECORD_NAME, Record
from vpmoe_assets.lineage.treestate import TreeState, states_of

Intact = tuple[Path, Record, TreeState, Sequence[tuple[str, str]]]
"""Of a version: its directory, its record, its state from before its files were read, and path and message of
each file that is not there with reason."""

_MANY = 50_000
"""So many files are looked at sooner than other processes have started."""


@dataclass(frozen=True, slots=True)
class Found:
    """What was found of a version when all that is there was as its record says.

    Attributes:
        objects: That its record names, by role.
        absent: Path and message of each file that was not there, and about which a statement spoke.
    """

    objects: Mapping[str, str]
    absent: Sequence[tuple[str, str]] = ()


class IntactStates:
    """The states of a store's versions in which their files were found intact.

    Args:
        path: Of the database.
        workers: Processes that look at many files; with more than one, the main module has to be one that may
            be imported.
    """

    def __init__(self, path: Path, workers: int = 1) -> None:
        self._memory = FileMemory(path)
        self._workers = workers

    def unchanged(self, heads: Mapping[Path, Head]) -> dict[Path, Found]:
        """Return what was found of those versions that are in the state in which they were found intact.

        Args:
            heads: Of versions, by their directory.
        """
        files: dict[Path, Identity] = {}
        for directory in heads:
            path = directory / RECORD_NAME
            try:
                files[path] = identity(path.stat())
            except OSError:
                continue  # gone meanwhile; whoever reads it says so
        known: dict[Path, tuple[str, Found]] = {}
        count = 0
        for path, text in self._memory.recall(files).items():
            head = heads[path.parent]
            try:
                artifact, record, state, of, objects, absent = parse_json(text)
            except ValueError:  # of another version of this program
                continue
            if (artifact, record) == (version_name(head), head.record_digest):
                known[path.parent] = state, Found(objects, [(name, message) for name, message in absent])
                count += of
        workers = self._workers if count > _MANY else 1
        states = states_of([str(directory) for directory in known], workers)
        return {
            directory: found
            for (directory, (digest, found)), state in zip(known.items(), states, strict=True)
            if state is not None and state.digest == digest
        }

    def keep(self, intact: Iterable[Intact]) -> None:
        """Remember versions whose files were found to be what their records say.

        What has changed meanwhile, or may still change unseen, is left out.
        """
        rows = []
        for directory, record, before, absent in intact:
            path = directory / RECORD_NAME
            try:
                known = identity(path.stat())
                same = settled(known) and before.quiet and TreeState.of(directory).digest == before.digest
            except OSError:
                continue
            if same:
                objects = record.objects.model_dump(exclude_none=True)
                name, digest = version_name(record), record.record_digest
                said = [name, digest, before.digest, before.files, objects, list(absent)]
                rows.append((path, known, json.dumps(said)))
        self._memory.keep(rows)

    def close(self) -> None:
        """Close the database."""
        self._memory.close()
