"""Statements: append-only facts about a record, each with time, author and reason.

::

    artifacts/.statements/<experiment>/<asset>/<record digest>.jsonl      one statement a line, oldest first

A record never changes; what is believed about it does. The id of a statement is the sha256 of its canonical
JSON, and each names the one before it about the same record, so a line that was altered or taken out is
noticed (the last ones of a file, and a whole file, by whoever remembers them: the index does). A statement is
one append under a lock, flushed to disk. It exists once its line has ended: what a kill cut short was never
said, and the next statement takes its place. The files lie by asset, so that what was said about a record
that is gone can still be found.
"""

import getpass
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from trainer.contract.canonical import UnstableValueError, canonical_json, sha256_json
from trainer.contract.credentials import redact, secret_values
from trainer.contract.files import sync
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.changes import Changes
from vpmoe_assets.lineage.errors import StatementError
from vpmoe_assets.lineage.layout import named_version, version_name
from vpmoe_assets.lineage.readings import Readings, files_below
from vpmoe_assets.lineage.record import (
    Frozen,
    Origin,
    Record,
    Sha256,
    Stable,
    Timestamp,
    safe_name,
    utc_now,
)

SCHEMA: Literal["vpmoe.statement/1"] = "vpmoe.statement/1"
DIRECTORY = ".statements"

KINDS: Mapping[str, frozenset[str]] = {
    "verdict": frozenset(  # what a check found
        {"check", "version", "outcome", "blocking", "severity", "description", "metadata"}
    ),
    "kept": frozenset({"check", "version", "missing"}),  # a later version could not judge: the verdict stays
    "retired": frozenset({"check"}),  # a check is no longer one of the asset's
    "waived": frozenset({"check"}),  # a person lets a blocking check without evidence pass
    "accepted": frozenset(  # a person says that other code or another recipe makes the same; `acceptance`
        {
            *("own", "files_of", "digest", "fingerprint", "code", "recipe", "packages", "inputs"),
            *("difference", "shown_by", "unknown"),
        }
    ),
    "withdrawn": frozenset({"statement"}),  # of an acceptance, by a person
    "refuted": frozenset({"statement", "digest", "by"}),  # made with what was accepted, it differs
    "reproduced": frozenset({"fingerprint", "by"}),  # making it again came out the same
    "not_reproduced": frozenset({"fingerprint", "by", "difference"}),  # the same way made another thing
    "restored": frozenset(),  # its files were made again
    "verified": frozenset(),
    "adopted": frozenset(),
    "pinned": frozenset(),  # a person keeps it, and what it was made from, from being cleaned away
    "unpinned": frozenset(),
    "collected": frozenset(),  # removed on purpose: all of it, or the `areas` of its body; `collected`
    "signed": frozenset({"key", "links", "public_key", "payload", "provenance"}),  # `attestation`
}
"""Every kind, and the keys that its body has at least. Kinds of a later program are kept, unread."""

PROGRAM = "vpmoe"
"""The author of what the program itself finds."""

_LOCK_WAIT_S = 60.0


class Statement(Frozen):
    """One fact about one record.

    Attributes:
        kind: One of `KINDS`, or one that a later program wrote.
        record: Digest of the record.
        artifact: `experiment/asset/version`, for people and for a record that is gone.
        time: ISO 8601 with offset.
        author: Who says so: `user@host` of a person, or the program.
        reason: Why, in a person's words; empty where the kind says it all.
        body: What the kind adds.
        previous: Id of the statement before it about the same record.
    """

    schema_: Literal["vpmoe.statement/1"] = Field(default=SCHEMA, alias="schema")
    kind: str
    record: Sha256
    artifact: str
    time: Timestamp
    author: str
    reason: str = ""
    body: Stable = Field(default_factory=dict)
    previous: Sha256 | None = None

    @property
    def id(self) -> str:
        """sha256 of the canonical JSON of its fields."""
        return sha256_json(self.model_dump(by_alias=True))

    @classmethod
    def about(
        cls,
        record: Record | Origin,
        kind: str,
        body: Mapping[str, Any] | None = None,
        *,
        reason: str = "",
        author: str | None = None,
    ) -> Self:
        """Return a statement of now, by the user of this process unless another author is named."""
        return cls(
            kind=kind,
            record=record.record_digest,
            artifact=version_name(record),
            time=utc_now(),
            author=author or this_user(),
            reason=reason,
            body=dict(body or {}),
        )

    def followed_by(
        self, kind: str, body: Mapping[str, Any], *, reason: str = "", author: str | None = None
    ) -> Self:
        """Return a statement of now about the same record, which may be gone."""
        fields = {"kind": kind, "time": utc_now(), "author": author or this_user(), "reason": reason}
        return self.model_copy(update={**fields, "body": dict(body), "previous": None})


@dataclass(frozen=True, slots=True)
class Summary:
    """What was said about one record, in short.

    Attributes:
        asset: Name.
        record_digest: Of the record.
        version: Name.
        kinds: Of the statements.
    """

    asset: str
    record_digest: str
    version: str
    kinds: frozenset[str]


class Statements:
    """All statements of a store.

    Args:
        root: Of the store.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root) / DIRECTORY
        self._read: dict[Path, tuple[tuple[int, int, int], tuple[Statement, ...]]] = {}
        self._changes = Changes(root)

    def append(self, statement: Statement) -> Statement:
        """Add a statement, without credentials; it is on disk when this returns.

        Returns:
            The statement as written, with the one before it named.

        Raises:
            StatementError: Its kind is unknown, its body lacks a key, or the earlier statements about the
                same record were altered: nothing is added to those.
        """
        if statement.kind not in KINDS:
            raise StatementError(f"{statement.kind!r} is no kind of statement; there are {', '.join(KINDS)}")
        _complete(statement, f"a statement about {statement.artifact}")
        (written,) = self._append(statement.artifact, statement.record, lambda _: [statement])
        return written

    def append_after(
        self, record: Record, decide: Callable[[tuple[Statement, ...]], Sequence[Statement]]
    ) -> None:
        """Add what is still to be said about a record: of several that find the same at once, one says it.

        Args:
            record: That it is about.
            decide: Is given what was said so far, oldest first, to which nobody adds meanwhile; returns
                what to add, as `append` does.

        Raises:
            StatementError: As `append`.
        """
        self._append(version_name(record), record.record_digest, decide)

    def _append(
        self,
        artifact: str,
        record_digest: str,
        decide: Callable[[tuple[Statement, ...]], Sequence[Statement]],
    ) -> list[Statement]:
        """Return what was written."""
        experiment, asset, _ = named_version(artifact)
        path = self._path(experiment, asset, record_digest)
        path.parent.mkdir(parents=True, exist_ok=True)
        with (
            self._changes.noted(artifact),
            locks.hold(path.parent / ".lock", f"statements about {experiment}/{asset}", _LOCK_WAIT_S),
        ):
            earlier = self._statements(path)
            previous, written = earlier[-1].id if earlier else None, []
            for statement in decide(earlier):
                safe = redact({"reason": statement.reason, "body": statement.body}, secret_values())
                written.append(statement.model_copy(update={**safe, "previous": previous}))
                previous = written[-1].id
                _append_line(path, canonical_json(written[-1].model_dump(by_alias=True) | {"id": previous}))
        return written

    def about(self, record: Record) -> tuple[Statement, ...]:
        """Return the statements about a record, oldest first.

        Raises:
            StatementError: A line was altered, or one is missing; names file and line.
        """
        return self.about_digest(record.experiment, record.asset, record.record_digest)

    def about_digest(self, experiment: str, asset: str, record_digest: str) -> tuple[Statement, ...]:
        """Return the statements about a record that may be gone, oldest first.

        Raises:
            StatementError: As `about`.
        """
        return self._statements(self._path(experiment, asset, record_digest))

    def of_asset(
        self, experiment: str, asset: str, kind: str | None = None
    ) -> dict[str, tuple[Statement, ...]]:
        """Return what was said about every record of an asset, also of those that are gone, by record digest.

        Args:
            experiment: Name.
            asset: Name.
            kind: Only records about which something of this kind was said (then all that was said).

        Raises:
            StatementError: As `about`.
        """
        needle = None if kind is None else f'"kind":{json.dumps(kind)}'.encode("ascii")
        found: dict[str, tuple[Statement, ...]] = {}
        for path in sorted((self.root / safe_name(experiment) / safe_name(asset)).glob("*.jsonl")):
            if needle is None or needle in path.read_bytes():
                found[path.stem] = self._statements(path)
        return found

    def assets(self, experiment: str) -> list[str]:
        """Return the assets of an experiment about whose records something was said, sorted."""
        return sorted(path.name for path in (self.root / safe_name(experiment)).glob("*/"))

    def summaries(
        self, experiment: str, readings: Readings, altered: Callable[[str, str, StatementError], None]
    ) -> Iterator[Summary]:
        """Yield about which records of an experiment something was said, sorted by asset and digest.

        Args:
            experiment: Name.
            readings: Remembers which files were whole, and what was in them.
            altered: Called with asset, record digest and error for each file that is not.
        """

        def read(path: Path) -> str | None:
            try:
                said = self._statements(path)
            except StatementError as error:
                altered(path.parent.name, path.stem, error)
                return None
            return " ".join(([said[0].artifact, *sorted({each.kind for each in said})]) if said else ())

        files = dict(sorted(files_below(self.root / safe_name(experiment), 1, ".jsonl")))
        for path, text in readings(files, read).items():
            if text:
                artifact, *kinds = text.split(" ")
                yield Summary(path.parent.name, path.stem, artifact.rpartition("/")[2], frozenset(kinds))

    def all(self) -> Iterator[Statement]:
        """Yield every statement of the store, by experiment, asset and record, oldest first.

        Raises:
            StatementError: As `about`.
        """
        for path in sorted(self.root.glob("*/*/*.jsonl")):
            yield from self._statements(path)

    def _path(self, experiment: str, asset: str, record_digest: str) -> Path:
        return self.root / safe_name(experiment) / safe_name(asset) / f"{record_digest}.jsonl"

    def _statements(self, path: Path) -> tuple[Statement, ...]:
        """Return the statements of a file; it is read again only when it has changed."""
        try:
            status = path.stat()
        except FileNotFoundError:
            return ()
        identity = (status.st_ino, status.st_size, status.st_ctime_ns)
        known = self._read.get(path)
        if known is None or known[0] != identity:
            known = self._read[path] = (identity, tuple(_parsed(path)))
        return known[1]


def this_user() -> str:
    """Return `user@host` of this process."""
    import socket

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _append_line(path: Path, line: str) -> None:
    new = not path.exists()
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    with os.fdopen(descriptor, "r+b") as file:
        content = file.read()
        end = content.rfind(b"\n") + 1
        if end != len(content):  # cut short by a kill
            file.truncate(end)
        file.seek(end)
        file.write(line.encode("ascii") + b"\n")
        file.flush()
        os.fsync(descriptor)
    if new:
        sync(path.parent)


def _parsed(path: Path) -> Iterator[Statement]:
    """Yield the statements of a file, each checked against its id and the one before it."""
    previous: str | None = None
    for number, line in enumerate(path.read_bytes().split(b"\n")[:-1], start=1):
        where = f"{path}:{number}"
        try:
            fields = parse_json(line)
            stated = fields.pop("id")
            whole = sha256_json(fields) == stated
        except (ValueError, AttributeError, TypeError, KeyError, RecursionError, UnstableValueError):
            whole = False
        if not whole:
            raise StatementError(f"{where}: altered since it was written")
        try:
            statement = Statement.model_validate(fields)
        except ValidationError as error:
            raise StatementError(f"{where}: not a statement of schema {SCHEMA}: {error}") from error
        if (statement.record, statement.previous) != (path.stem, previous):
            raise StatementError(f"{where}: does not follow the statement before it")
        _complete(statement, where)
        previous = stated
        yield statement


def _complete(statement: Statement, where: str) -> None:
    if missing := KINDS.get(statement.kind, frozenset()) - statement.body.keys():
        raise StatementError(f"{where}: a {statement.kind} without {', '.join(sorted(missing))}")
