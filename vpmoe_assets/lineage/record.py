"""The record: one JSON file per artifact that says everything about it, `.artifact.json`.

The file is the record's fields plus `record_digest`, the sha256 of the canonical JSON of all the others.
Each input is named with the digest of *its* record, so records form a Merkle DAG: whoever trusts one digest
can verify the whole ancestry behind it.

Metric names that the views of the index know (give them where they apply): `parameters`,
`active_parameters`, `num_layers`, `hidden_size`, `loss` (the last training loss) and
`valid_loss`, nats per token.

A format's manifest stays a file of its own beside `payload/`; the record holds its hash, and the hash of
its canonical content without the volatile fields, which is what downstream fingerprints may use. It is not
embedded: a corpus of ten thousand shards would double every record of its ancestry.

A record never changes. What is believed about it (verdicts of checks, acceptances, restorations) are
statements about its digest, in `vpmoe_assets.lineage.statements`. Records of schema 1 held their verdicts
themselves; they stay readable and verifiable, and are never rewritten.
"""

import hashlib
import json
import re
from datetime import UTC, datetime
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from trainer.contract.canonical import UnstableValueError, canonical_json, sha256_json
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.digest import FileEntry, merkle_root, safe_relative
from vpmoe_assets.lineage.errors import LineageError, RecordError

SCHEMA: Literal["vpmoe.artifact/2"] = "vpmoe.artifact/2"
EARLIER: Literal["vpmoe.artifact/1"] = "vpmoe.artifact/1"
RECORD_NAME = ".artifact.json"
MANIFEST_NAME = "manifest.json"

_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.\-]*")


def safe_name(name: str) -> str:
    """Return `name` if it may name a directory of the store.

    Raises:
        RecordError: It is empty, starts with a dot or dash, or has characters other than `A-Za-z0-9_.-`.
    """
    if not _NAME.fullmatch(name):
        raise RecordError(
            f"{name!r} is no name for an experiment, asset or version (use letters, digits, _ . -)"
        )
    return name


def _stable(value: dict[str, Any]) -> dict[str, Any]:
    canonical_json(value)
    return value


def _timestamp(value: str) -> str:
    if datetime.fromisoformat(value).tzinfo is None:
        raise ValueError(f"{value!r} has no UTC offset")
    return value


Name = Annotated[str, AfterValidator(safe_name)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
GitSha = Annotated[str, StringConstraints(pattern=r"^([0-9a-f]{40}|[0-9a-f]{64})$")]
Stable = Annotated[dict[str, Any], AfterValidator(_stable)]
"""A dict whose canonical JSON exists."""
Timestamp = Annotated[str, AfterValidator(_timestamp)]
"""ISO 8601 with an offset, e.g. `2026-01-31T12:00:00+00:00`."""


def utc_now() -> Timestamp:
    """Return the time with milliseconds."""
    return datetime.now(UTC).isoformat(timespec="milliseconds")


Scalar = bool | int | float | str | None


class Frozen(BaseModel):
    """What records and statements are made of: immutable, no unknown fields, no NaN."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, defer_build=True)


class InputRef(Frozen):
    """An artifact that another was made from.

    Attributes:
        acceptance: Id of the statement by which a person had accepted the input as what other code makes, if
            one was in force.
    """

    asset: Name
    version: Name
    digest: Sha256
    record_digest: Sha256
    role: str
    acceptance: Sha256 | None = None


class Origin(Frozen):
    """The artifact whose files another record names again: of another experiment, or an earlier version."""

    experiment: Name
    asset: Name
    version: Name
    record_digest: Sha256


class Objects(Frozen):
    """Objects of the store, by sha256, that together are enough to repeat the step.

    Attributes:
        sources: The project's source files, as the step ran them.
        experiment: The experiment's TOML, as written.
        resolved_experiment: The same with every default written out, as canonical JSON.
        run_config: Dagster's run configuration, as canonical JSON.
        packages: Every installed package with version and hash, as canonical JSON.
        patch: Difference between the commit and the source files; None for a clean tree.
    """

    sources: Sha256 | None = None
    experiment: Sha256 | None = None
    resolved_experiment: Sha256 | None = None
    run_config: Sha256 | None = None
    packages: Sha256 | None = None
    patch: Sha256 | None = None


class Attempt(Frozen):
    """One start of the work, from its beginning to its end; the last one delivered.

    Attributes:
        started_utc: ISO 8601 with offset, also `ended_utc` (of one that was killed the last sign of life, or
            null).
        ended: `done`, `interrupted`, `failed: reason`, `killed`.
        resumed_from: Step of the checkpoint that it went on from, or null.
        sources: sha256 of the snapshot that it ran from; what decides bytes is equal in those of all starts.
    """

    started_utc: Timestamp
    ended_utc: Timestamp | None = None
    ended: str = "done"
    resumed_from: int | None = None
    sources: Sha256 | None = None


class CheckOutcome(Frozen):
    """What one check of the artifact found, in records of schema 1; now it is a statement."""

    name: str
    passed: bool
    blocking: bool
    severity: Literal["WARN", "ERROR"] = "ERROR"
    description: str = ""
    metadata: Stable = Field(default_factory=dict)


class CodeState(Frozen):
    """The code that ran; see `vpmoe_assets.lineage.provenance.code_of`."""

    git_sha: GitSha
    git_dirty: bool
    patch_digest: Sha256 | None
    source_digest: Sha256


class ManifestRef(Frozen):
    """The file `manifest.json` beside `payload/`: its bytes, and its content without volatile fields."""

    size: int
    sha256: Sha256
    content_sha256: Sha256


class EvalScore(Frozen):
    """One score of one object: a task of a suite, or the suite itself (`task` = `"mean"`)."""

    object_asset: Name
    object_version: Name
    suite: str
    task: str
    score: float
    centered: float | None = None
    correct: int | None = None
    total: int | None = None
    stderr: float | None = None


class PerfFigure(Frozen):
    """One measured speed or size."""

    name: str
    value: float
    unit: str
    device: str
    context: Stable = Field(default_factory=dict)


class Draft(Frozen):
    """What the maker of an artifact states; the store adds files, digests, version and sequence.

    Attributes:
        fingerprint_payload: From `vpmoe_assets.lineage.fingerprint.recipe_fingerprint`.
        execution: How it ran and what may not change bytes: device, processes, DP/TP/EP, launcher, W&B mode.
        environment: From `vpmoe_assets.lineage.provenance.environment`.
        started_utc: ISO 8601 with offset, also `finished_utc`.
        details: What the format or a checkpoint adds: student spec, transform, tokenizer, tokens consumed, …
        objects: What is kept of sources, configuration and packages.
        blocking_checks: Names of the blocking checks it has to pass; one without a verdict blocks as well.
        original: Whose files these are, where they were not made anew.
        attempts: Every start of the work, where it took more than this process.
        checks: Of a record of schema 1.
    """

    fingerprint_payload: Stable
    inputs: tuple[InputRef, ...] = ()
    execution: Stable = Field(default_factory=dict)
    seed: int | None = None
    code: CodeState
    environment: Stable
    command: tuple[str, ...]
    started_utc: Timestamp
    finished_utc: Timestamp
    metrics: dict[str, Scalar] = Field(default_factory=dict)
    checks: tuple[CheckOutcome, ...] = ()
    evals: tuple[EvalScore, ...] = ()
    perf: tuple[PerfFigure, ...] = ()
    details: Stable = Field(default_factory=dict)
    dagster_run_id: str | None = None
    objects: Objects = Objects()
    blocking_checks: tuple[str, ...] = ()
    original: Origin | None = None
    attempts: tuple[Attempt, ...] = ()


class Record(Draft):
    """One published artifact. Construct it through `vpmoe_assets.lineage.store.Store.publish`."""

    schema_: Literal["vpmoe.artifact/1", "vpmoe.artifact/2"] = Field(default=SCHEMA, alias="schema")
    experiment: Name
    asset: Name
    version: Name
    sequence: int = Field(ge=1)
    published_utc: Timestamp
    fingerprint: Sha256
    digest: Sha256
    files: tuple[FileEntry, ...] = Field(min_length=1)
    run_files: tuple[FileEntry, ...] = ()
    manifest: ManifestRef | None = None

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        for entry in (*self.files, *self.run_files):
            safe_relative(entry.path)
        if sha256_json(self.fingerprint_payload) != self.fingerprint:
            raise RecordError("the fingerprint is not the sha256 of its payload")
        if merkle_root(self.files) != self.digest:
            raise RecordError("the content digest is not the Merkle root of the file list")
        other = _LATER if self.earlier else _FORMER
        if misplaced := sorted(other & self.model_fields_set - _empty(self)):
            raise RecordError(f"{', '.join(misplaced)}: not in a record of schema {self.schema_}")
        return self

    @property
    def earlier(self) -> bool:
        """Whether it is of schema 1: its fingerprint covers other things, and its verdicts are in it."""
        return self.schema_ == EARLIER

    @property
    def recipe(self) -> dict[str, Any]:
        """The resolved recipe, from the fingerprint's payload."""
        recipe: dict[str, Any] = self.fingerprint_payload.get("recipe", {})
        return recipe

    @property
    def size(self) -> int:
        """Bytes of the payload."""
        return sum(entry.size for entry in self.files)

    @cached_property
    def record_digest(self) -> str:
        """sha256 of the canonical JSON of every field."""
        return record_digest(self)

    def as_input(self, role: str | None = None, acceptance: str | None = None) -> InputRef:
        """Return the reference by which a child names this artifact; its role is the asset by default."""
        return InputRef(
            asset=self.asset,
            version=self.version,
            digest=self.digest,
            record_digest=self.record_digest,
            role=role or self.asset,
            acceptance=acceptance,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields that its schema has as plain JSON values, without the record digest."""
        fields = self.model_dump(by_alias=True, exclude=set(_LATER if self.earlier else _FORMER))
        if self.earlier:
            for reference in fields["inputs"]:
                del reference["acceptance"]
        return fields


_LATER = frozenset({"objects", "blocking_checks", "original", "attempts"})
"""Fields that schema 1 had not."""
_FORMER = frozenset({"checks"})
"""Fields that only schema 1 had."""


def _empty(record: Record) -> set[str]:
    """Names of fields that say nothing."""
    return {name for name in _LATER | _FORMER if getattr(record, name) in ((), None, Objects())}


def record_digest(record: Record) -> str:
    """Return the sha256, in hex, of the canonical JSON of the record's fields."""
    return sha256_json(record.to_dict())


def record_bytes(record: Record) -> bytes:
    """Return the contents of `.artifact.json`: readable JSON, fields and `record_digest` sorted."""
    fields = json.loads(canonical_json(record.to_dict()))
    text = json.dumps({**fields, "record_digest": record.record_digest}, sort_keys=True, indent=1)
    return text.encode("ascii") + b"\n"


def read_record(path: Path) -> Record:
    """Read and check one `.artifact.json`: schema, digests, and the paths in it.

    Raises:
        FileNotFoundError: No such file.
        RecordError: Not JSON, another schema, fields altered since it was written, or contradicting itself.
    """
    try:
        fields = parse_json(path.read_bytes())
    except ValueError as error:
        raise RecordError(f"{path}: not a JSON record ({error}); {_REMEDY}") from error
    if not isinstance(fields, dict) or fields.get("schema") not in (SCHEMA, EARLIER):
        found = fields.get("schema") if isinstance(fields, dict) else type(fields).__name__
        raise RecordError(f"{path}: schema {found!r}, expected {SCHEMA!r} or {EARLIER!r}")
    stated = fields.pop("record_digest", None)
    try:
        actual = _sha256_parsed(fields)
    except (UnstableValueError, RecursionError) as error:
        raise RecordError(f"{path}: {error}; {_REMEDY}") from error
    if stated != actual:
        raise RecordError(
            f"{path}: altered since it was written (digest {actual}, record says {stated}); {_REMEDY}"
        )
    try:
        record = Record.model_validate(fields)
    except (ValidationError, LineageError, UnstableValueError, RecursionError) as error:
        raise RecordError(f"{path}: {_first_problem(error)}; {_REMEDY}") from error
    vars(record)["record_digest"] = actual  # the cached property: it need not be computed once more
    return record


def _sha256_parsed(fields: dict[str, Any]) -> str:
    """Return `sha256_json` of parsed JSON: there only NaN and infinity have no stable form."""
    try:
        text = json.dumps(fields, sort_keys=True, allow_nan=False, separators=(",", ":"))
    except ValueError:
        return sha256_json(fields)  # which says where
    return hashlib.sha256(text.encode("ascii")).hexdigest()


_REMEDY = "materialise the asset again"


def _first_problem(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors(include_url=False)[0]
        return f"field {'.'.join(map(str, first['loc']))}: {first['msg']}"
    return str(error)
