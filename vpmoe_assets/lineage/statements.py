"""Statements: append-only facts about a record, each with time, author and reason.

::

    artifacts/.statements/<first 2 hex digits>/<record digest>.jsonl      one statement a line, oldest first

A record never changes; what is believed about it does. A line is written with one append under a lock and
flushed to disk; a last line that a kill cut short is ignored, and the next statement starts a line of its
own. The id of a statement is the sha256 of its canonical JSON, and each names the one before it about the
same record, so that a line that was altered or taken out is noticed.
"""

import getpass
import json
import os
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationError

from trainer.contract.canonical import canonical_json, sha256_json
from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.errors import StatementError
from vpmoe_assets.lineage.record import Frozen, Record, Sha256, Stable, Timestamp
from vpmoe_assets.lineage.redaction import redact, secret_values

SCHEMA: Literal["vpmoe.statement/1"] = "vpmoe.statement/1"
DIRECTORY = ".statements"

Kind = Literal[
    "verdict",  # what a check found; body: check, version, outcome, blocking, severity, description, metadata
    "retired",  # a check is no longer among those of the asset; body: check
    "waived",  # a person lets a blocking check without evidence pass; body: check
    "accepted",  # a person says that other code or recipe makes the same; see `acceptance`
    "withdrawn",  # of an acceptance; body: statement
    "refuted",  # a repetition under an acceptance came out different; body: statement, digest
    "reproduced",  # a repetition came out the same; body: fingerprint
    "restored",  # its files were made again; body: run, lost
    "verified",
    "adopted",
    "pinned",
    "collected",
    "signed",
]

_LOCK_WAIT_S = 60.0


class Statement(Frozen):
    """One fact about one record.

    Attributes:
        record: Digest of the record.
        artifact: `experiment/asset/version`, for people and for a record that is gone.
        time: ISO 8601 with offset.
        author: Who says so: `user@host` of a person, or the name of the program's part.
        reason: Why, in a person's words; empty where the kind says it all.
        body: What the kind adds.
        previous: Id of the statement before it about the same record.
    """

    schema_: Literal["vpmoe.statement/1"] = Field(default=SCHEMA, alias="schema")
    kind: Kind
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
        record: Record,
        kind: Kind,
        body: Mapping[str, Any] | None = None,
        *,
        reason: str = "",
        author: str | None = None,
    ) -> Self:
        """Return a statement of now, by the user of this process unless another author is named."""
        return cls(
            kind=kind,
            record=record.record_digest,
            artifact=f"{record.experiment}/{record.asset}/{record.version}",
            time=datetime.now(UTC).isoformat(timespec="milliseconds"),
            author=author or this_user(),
            reason=reason,
            body=dict(body or {}),
        )


class Statements:
    """All statements of a store.

    Args:
        root: Of the store.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root) / DIRECTORY

    def append(self, statement: Statement) -> Statement:
        """Add a statement, without credentials; it is on disk when this returns.

        Returns:
            The statement as written, with the one before it named.

        Raises:
            StatementError: The earlier ones about the same record were altered: nothing is added to them.
        """
        path = self._path(statement.record)
        path.parent.mkdir(parents=True, exist_ok=True)
        with locks.hold(path.with_suffix(".lock"), f"statements about {statement.artifact}", _LOCK_WAIT_S):
            earlier = self.about(statement.record)
            safe = redact({"reason": statement.reason, "body": statement.body}, secret_values())
            written = statement.model_copy(update={**safe, "previous": earlier[-1].id if earlier else None})
            line = canonical_json(written.model_dump(by_alias=True) | {"id": written.id}) + "\n"
            descriptor = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o666)
            try:
                size = os.fstat(descriptor).st_size
                whole = size == 0 or os.pread(descriptor, 1, size - 1) == b"\n"
                os.write(descriptor, ("" if whole else "\n").encode() + line.encode("ascii"))
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
        return written

    def about(self, record_digest: str) -> list[Statement]:
        """Return the statements about a record, oldest first.

        Raises:
            StatementError: A line was altered, or one is missing; names file and line.
        """
        path = self._path(record_digest)
        try:
            lines = path.read_bytes().split(b"\n")
        except FileNotFoundError:
            return []
        found: list[Statement] = []
        for number, line in enumerate(lines, start=1):
            statement = _parsed(line) if line else None
            if statement is None:
                if line and _is_json(line):
                    raise StatementError(f"{path}:{number}: altered since it was written")
                continue  # cut short by a kill, or empty
            if statement.record != record_digest or statement.previous != (found[-1].id if found else None):
                raise StatementError(f"{path}:{number}: does not follow the statement before it")
            found.append(statement)
        return found

    def records(self) -> Iterator[str]:
        """Yield the digest of every record about which something is stated, sorted."""
        yield from sorted(path.stem for path in self.root.glob("*/*.jsonl"))

    def _path(self, record_digest: str) -> Path:
        return self.root / record_digest[:2] / f"{record_digest}.jsonl"


def this_user() -> str:
    """Return `user@host` of this process."""
    import socket

    try:
        name = getpass.getuser()
    except (KeyError, OSError):  # a user id without a name, in a container
        name = str(os.getuid())
    return f"{name}@{socket.gethostname()}"


def _parsed(line: bytes) -> Statement | None:
    try:
        fields = json.loads(line)
        stated = fields.pop("id")
        statement = Statement.model_validate(fields)
    except (ValueError, AttributeError, KeyError, ValidationError):
        return None
    return statement if statement.id == stated else None


def _is_json(line: bytes) -> bool:
    try:
        json.loads(line)
    except ValueError:
        return False
    return True
