"""Rows of the index, derived from one record and the files beside it: no database here."""

import hashlib
import json
import math
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson

from trainer.contract.canonical import canonical_json, sha256_json
from vpmoe_assets.lineage.difference import recipe_leaves
from vpmoe_assets.lineage.fingerprint import recorded_code_version
from vpmoe_assets.lineage.record import MANIFEST_NAME, EvalScore, Record
from vpmoe_assets.lineage.standing import Finding, findings
from vpmoe_assets.lineage.statements import Statement

Row = tuple[Any, ...]
Rows = dict[str, list[Row]]
"""Rows by table."""

METRICS_FILE = "metrics.jsonl"
MOST_STEPS = 1000
"""Steps of one curve kept in the index, at most."""


def rows_of(record: Record, directory: Path, statements: Sequence[Statement]) -> Rows:
    """Return the rows of every table that describe one artifact, in a fixed order.

    Args:
        record: The artifact.
        directory: Of its version; the manifest and the training curve are read from there.
        statements: About it, oldest first.
    """
    key = (record.experiment, record.asset, record.version, record.record_digest)
    found = findings(record, statements)
    points, unreadable = _metric_points(directory / "run" / METRICS_FILE)
    metrics: list[Row] = [(*key, name, *_scalar(value)) for name, value in sorted(record.metrics.items())]
    if unreadable:
        metrics.append((*key, "unreadable_metric_lines", float(unreadable), None))
    sources = record.fingerprint_payload.get("sources", {})
    return {
        "artifacts": [_artifact(record, any(finding.blocks for finding in found))],
        "runs": [_run(record)],
        "attempts": [(*key, position, *attempt) for position, attempt in enumerate(_attempts(record))],
        "inputs": [(*key, *named) for named in _inputs(record)],
        "files": [(*key, *file) for file in _files(record)],
        "shards": [(*key, *shard) for shard in _shards(directory / MANIFEST_NAME, record)],
        "recipe_keys": [(*key, *leaf) for leaf in _recipe_keys(record)],
        "sources": [(*key, path, digest) for path, digest in sorted(sources.items())],
        "packages": [(*key, *package) for package in _packages(record)],
        "metrics": metrics,
        "metric_points": [(*key, *point) for point in points],
        "checks": [(*key, *_check(finding)) for finding in found],
        "statements": [(*key, *statement) for statement in _statements(statements)],
        "evals": [
            (*key, e.object_asset, e.object_version, e.suite, e.task, *_score(e)) for e in record.evals
        ],
        "perf": [(*key, p.name, p.value, p.unit, p.device, canonical_json(p.context)) for p in record.perf],
    }


def _artifact(record: Record, blocked: bool) -> Row:
    code = record.code
    return (
        record.experiment,
        record.asset,
        record.version,
        record.sequence,
        record.fingerprint,
        recorded_code_version(record.fingerprint_payload),
        sha256_json(record.recipe),
        record.digest,
        record.record_digest,
        record.manifest.content_sha256 if record.manifest else None,
        record.size,
        len(record.files),
        _utc(record.published_utc),
        blocked,
        record.seed,
        code.git_sha,
        code.git_dirty,
        code.patch_digest,
        code.source_digest,
        canonical_json(record.recipe),
        canonical_json(record.details),
        record.schema_,
        *_original(record),
        canonical_json(record.objects.model_dump(exclude_none=True)),
    )


def _original(record: Record) -> tuple[str | None, str | None, str | None, str | None]:
    origin = record.original
    if origin is None:
        return None, None, None, None
    return origin.experiment, origin.asset, origin.version, origin.record_digest


def _run(record: Record) -> Row:
    started, finished = _utc(record.started_utc), _utc(record.finished_utc)
    environment = record.environment
    packages = environment.get("packages") or {}
    return (
        record.experiment,
        record.asset,
        record.version,
        record.record_digest,
        record.dagster_run_id,
        " ".join(record.command),
        started,
        finished,
        _worked_s(record),
        record.execution.get("device"),
        environment.get("host"),
        environment.get("python"),
        packages.get("torch"),
        packages.get("megatron-core"),
        environment.get("cuda"),
        environment.get("lock_digest"),
        canonical_json(record.execution),
        canonical_json(environment),
    )


def _attempts(record: Record) -> Iterator[Row]:
    """Yield (start, end, how it ended, step that it went on from, sources) of every start of the work."""
    if not record.attempts:
        yield _utc(record.started_utc), _utc(record.finished_utc), "done", None, record.objects.sources
    for each in record.attempts:
        ended = None if each.ended_utc is None else _utc(each.ended_utc)
        yield _utc(each.started_utc), ended, each.ended, each.resumed_from, each.sources


def _inputs(record: Record) -> Iterator[Row]:
    """Yield (kind, role, experiment, asset, version, digest, record digest, acceptance)."""
    for ref in record.inputs:
        named = (record.experiment, ref.asset, ref.version, ref.digest, ref.record_digest)
        yield "input", ref.role, *named, ref.acceptance
    if (origin := record.original) is not None:
        named = (origin.experiment, origin.asset, origin.version, record.digest, origin.record_digest)
        yield "original", "original", *named, None


def _recipe_keys(record: Record) -> Iterator[Row]:
    """Yield (dotted key, value as JSON, value as a number)."""
    for key, value in recipe_leaves(record.recipe):
        read = json.loads(value)
        yield key, value, float(read) if type(read) in (int, float) else None


def _worked_s(record: Record) -> float:
    """Return the time that was worked on an artifact, in seconds: of every start, and not of the pauses."""
    spans = [(each.started_utc, each.ended_utc) for each in record.attempts] or [
        (record.started_utc, record.finished_utc)
    ]
    return sum((_utc(end) - _utc(begin)).total_seconds() for begin, end in spans if end is not None)


def _files(record: Record) -> Iterator[Row]:
    if record.manifest:
        yield "manifest", MANIFEST_NAME, record.manifest.size, record.manifest.sha256
    for area, entries in (("payload", record.files), ("run", record.run_files)):
        for entry in entries:
            yield area, entry.path, entry.size, entry.sha256


def _packages(record: Record) -> Iterator[Row]:
    """Yield (package, version, whether the version decides the bytes)."""
    deciding: dict[str, str] = record.fingerprint_payload.get("packages", {})
    present: dict[str, str | None] = record.environment.get("packages") or {}
    for name, version in sorted((present | deciding).items()):
        if version is not None:
            yield name, version, name in deciding


def _shards(manifest: Path, record: Record) -> Iterator[Row]:
    """Yield (split, position, name, rows, tokens, row groups, bytes, sha256) of a dataset's manifest.

    Two shapes are known: `splits.<split>.shards[]` and `storage.shards[]`; a manifest with neither
    describes no shards, and neither does one that is not the one that was published.
    """
    if record.manifest is None or not manifest.is_file():
        return
    written = manifest.read_bytes()
    if hashlib.sha256(written).hexdigest() != record.manifest.sha256:
        return
    content = json.loads(written)
    if not isinstance(content, dict):
        return
    lists: list[tuple[str | None, Any]] = []
    if isinstance(splits := content.get("splits"), dict):
        lists += [
            (name, split.get("shards")) for name, split in sorted(splits.items()) if isinstance(split, dict)
        ]
    if isinstance(storage := content.get("storage"), dict):
        lists.append((None, storage.get("shards")))
    for split, shards in lists:
        for position, shard in enumerate(shards if isinstance(shards, list) else []):
            size = shard.get("bytes")
            yield (
                split,
                position,
                str(shard.get("name") or shard.get("path") or position),
                shard.get("rows"),
                shard.get("tokens"),
                shard.get("row_groups"),
                sum(size.values()) if isinstance(size, dict) else size,
                canonical_json(shard["sha256"]) if "sha256" in shard else None,
            )


def _metric_points(path: Path) -> tuple[list[Row], int]:
    """Return (step, name, value) of a training curve, thinned, and the number of lines that are no JSON.

    Reads once in constant memory. Every `stride`-th line is kept, and the stride doubles whenever too many
    are held; the first and the last step are always kept. A step logged twice (training resumed before it)
    counts as logged last.
    """
    kept: dict[int, dict[str, Any]] = {}
    last: tuple[int, dict[str, Any]] | None = None
    count, stride, unreadable = 0, 1, 0
    if not path.is_file():
        return [], 0
    with path.open("rb") as lines:
        for line in lines:
            try:
                fields = orjson.loads(line)
                step = fields.get("step", fields.get("iteration"))
            except (ValueError, AttributeError):
                unreadable += bool(line.strip())
                continue
            if type(step) is not int:
                continue
            last = step, fields
            if step in kept or count % stride == 0:
                kept[step] = fields
            count += 1
            if len(kept) > MOST_STEPS:
                stride *= 2
                kept = {step: kept[step] for step in sorted(kept)[::2]}
    if last is not None:
        kept[last[0]] = last[1]
    return [point for step in sorted(kept) for point in _points(step, kept[step])], unreadable


def _points(step: int, fields: dict[str, Any]) -> Iterator[Row]:
    for name, value in sorted(fields.items()):
        if name not in ("step", "iteration") and type(value) in (int, float) and math.isfinite(value):
            yield step, name, float(value)


def _check(finding: Finding) -> Row:
    return (
        finding.check,
        finding.outcome == "passed",
        finding.blocking,
        finding.severity,
        finding.description,
        canonical_json(dict(finding.metadata)),
        finding.outcome,
        finding.version,
        finding.waived_by,
    )


def _statements(statements: Sequence[Statement]) -> Iterator[Row]:
    force = _in_force(statements)
    for position, statement in enumerate(statements):
        yield (
            position,
            statement.id,
            statement.kind,
            statement.author,
            statement.reason,
            _utc(statement.time),
            canonical_json(statement.body),
            statement.id in force,
        )


def _in_force(statements: Sequence[Statement]) -> set[str]:
    """Return the ids of those statements that no later one about the same record took back or outdated."""
    force: dict[tuple[str, str], str] = {}
    for statement in statements:
        subject = statement.body.get("check")
        if statement.kind in ("verdict", "retired"):
            force.pop(("waived", str(subject)), None)
            force["verdict", str(subject)] = statement.id
        elif statement.kind == "waived":
            force["waived", str(subject)] = statement.id
        else:
            if statement.kind in ("withdrawn", "refuted"):
                force = {key: known for key, known in force.items() if known != statement.body["statement"]}
            force["", statement.id] = statement.id
    return set(force.values())


def _score(e: EvalScore) -> Row:
    return e.score, e.centered, e.correct, e.total, e.stderr


def _scalar(value: bool | int | float | str | None) -> tuple[float | None, str | None]:
    return (None, value) if isinstance(value, str) else (None if value is None else float(value), None)


def _utc(text: str) -> datetime:
    return datetime.fromisoformat(text).astimezone(UTC).replace(tzinfo=None)
