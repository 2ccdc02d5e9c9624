"""Where an artifact stands with its checks: their last verdicts, and what keeps others from using it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.statements import KINDS, Statement

Outcome = Literal["passed", "failed", "undetermined"]


@dataclass(frozen=True)
class Finding:
    """The last word on one check of one artifact.

    Attributes:
        check: Its name.
        outcome: `undetermined` where it never gave a verdict, and its evidence is gone or it has not run yet.
        blocking: Whether anything but `passed` keeps others from building on the artifact.
        severity: `WARN` or `ERROR`.
        description: One sentence for a reader.
        metadata: Measured values.
        version: Of the check's code that said so; None for a record of schema 1, or where nothing was said.
        waived_by: Id of the statement by which a person let it pass without a verdict.
        note: What a reader has to know beside the verdict: who let it pass and why, or that a later version
            of the check found no evidence to judge any more.
        kept_for: Version of the check that found no evidence.
    """

    check: str
    outcome: Outcome
    blocking: bool
    severity: str = "ERROR"
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None
    waived_by: str | None = None
    note: str = ""
    kept_for: str | None = None

    @property
    def blocks(self) -> bool:
        """Whether it keeps others from building on the artifact."""
        return self.blocking and self.outcome != "passed" and self.waived_by is None

    @property
    def reason(self) -> str:
        """Description and note, for a reader."""
        return "; ".join(filter(None, (self.description, self.note)))


def findings(record: Record, statements: Sequence[Statement]) -> tuple[Finding, ...]:
    """Return the last word on every check of an artifact, in the order in which they first spoke.

    Args:
        record: Of the artifact.
        statements: About it, oldest first.
    """
    found: dict[str, Finding] = {
        name: Finding(name, "undetermined", True, description="has not run")
        for name in record.blocking_checks
    }
    for outcome in record.checks:
        found[outcome.name] = Finding(
            outcome.name,
            "passed" if outcome.passed else "failed",
            outcome.blocking,
            outcome.severity,
            outcome.description,
            outcome.metadata,
        )
    for statement in statements:
        if statement.kind == "verdict":
            found[statement.body["check"]] = Finding(**{key: statement.body[key] for key in KINDS["verdict"]})
        elif statement.kind == "retired":
            found.pop(statement.body["check"], None)
        elif statement.kind == "withdrawn":
            _withdraw(found, statement.body["statement"])
        elif statement.kind in ("waived", "kept") and (now := found.get(statement.body["check"])) is not None:
            found[now.check] = _remarked(now, statement)
    return tuple(found.values())


def refusal(found: Sequence[Finding], asset: str) -> str:
    """Say which checks keep others from building on an artifact, and what to do.

    Args:
        found: Those that block; at least one.
        asset: As a user names it.
    """
    reasons = "; ".join(f"{finding.check}: {finding.reason or finding.outcome}" for finding in found)
    remedy = "Materialise it again, and its checks judge what is there anew"
    if silent := [finding.check for finding in found if finding.outcome == "undetermined"]:
        remedy += f"; where their evidence is gone, `vpmoe accept {asset} --check {silent[0]} --because TEXT`"
    return f"{reasons}. {remedy}"


def _withdraw(found: dict[str, Finding], waiver: str) -> None:
    for name, finding in found.items():
        if finding.waived_by == waiver:
            found[name] = replace(finding, waived_by=None, note="")


def _remarked(now: Finding, statement: Statement) -> Finding:
    if statement.kind == "kept":
        version = f"version {now.version[:12]}" if now.version else "a record of the earlier schema"
        return replace(
            now,
            note=f"the verdict is that of {version}, for the evidence is gone",
            kept_for=statement.body["version"],
        )
    if now.outcome != "undetermined":
        return now
    note = f"let pass by {statement.author} on {statement.time[:10]}: {statement.reason}"
    return replace(now, waived_by=statement.id, note=note)
