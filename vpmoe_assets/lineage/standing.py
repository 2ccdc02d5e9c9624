"""Where an artifact stands with its checks: their last verdicts, and what keeps others from using it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.statements import Statement

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
        version: Of the check's code that said so; None for a record of schema 1.
        waived_by: Id of the statement by which a person let it pass without a verdict.
    """

    check: str
    outcome: Outcome
    blocking: bool
    severity: str = "ERROR"
    description: str = ""
    metadata: Mapping[str, Any] = field(default_factory=dict)
    version: str | None = None
    waived_by: str | None = None

    @property
    def blocks(self) -> bool:
        """Whether it keeps others from building on the artifact."""
        return self.blocking and self.outcome != "passed" and self.waived_by is None


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
        body = statement.body
        if statement.kind == "verdict":
            found[body["check"]] = Finding(
                body["check"],
                body["outcome"],
                body["blocking"],
                body["severity"],
                body["description"],
                body["metadata"],
                body["version"],
            )
        elif statement.kind == "retired":
            found.pop(body["check"], None)
        elif statement.kind == "waived":
            now = found.get(body["check"])
            if now is not None and now.outcome == "undetermined":
                found[now.check] = replace(now, waived_by=statement.id)
    return tuple(found.values())
