"""The checks of published artifacts: run where they have no verdict yet, which becomes a statement.

Verdicts are no part of an artifact. A check that is new or whose code has changed judges what is there; one
that is gone is retired; nothing is ever made again for a check.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import dagster as dg

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.lineage.standing import Finding, findings
from vpmoe_assets.lineage.statements import Statement, Statements

Log = Callable[[str], None]

_AUTHOR = "vpmoe"


def judge(
    checks: Sequence[Check],
    item: Published,
    inputs: Mapping[str, Published],
    statements: Statements,
    log: Log,
) -> tuple[Finding, ...]:
    """Bring the verdicts about an artifact up to date, and return the last word on each check.

    A check runs where it has no verdict by its present code, and once more where the last one was a failure:
    what it blamed may have been outside the artifact. Where it judges evidence that was cleaned away, the old
    verdict stays, marked with the version that gave it; without one the outcome is undetermined, which
    blocks, if the check does, until a person lets it pass.

    Args:
        checks: Of the asset, as the code has them now.
        item: The artifact.
        inputs: What it was made from, by name.
        statements: Of its store.
        log: Told what is found.
    """
    known = {finding.check: finding for finding in _said(item, statements)}
    for check in checks:
        before = known.get(check.name)
        version = check.version
        if before is not None and before.outcome == "passed" and before.version == version:
            continue
        body = _verdict(check, version, item, inputs)
        if body["outcome"] == "undetermined" and before is not None and _stands(before):
            log(f"{item.record.asset}: check {check.name}: {body['description']}; {_kept(before)}")
            continue
        if before is None or _body(before) != body:
            statements.append(Statement.about(item.record, "verdict", body, author=_AUTHOR))
        log(f"{item.record.asset}: check {check.name} {_SAID[body['outcome']]}")
    for name in known.keys() - {check.name for check in checks}:
        statements.append(Statement.about(item.record, "retired", {"check": name}, author=_AUTHOR))
        log(f"{item.record.asset}: check {name} is no longer one of this asset's; its verdict counts no more")
    return _said(item, statements)


def check_results(found: Sequence[Finding], key: dg.AssetKey) -> list[dg.AssetCheckResult]:
    """Return the findings as Dagster shows them."""
    return [
        dg.AssetCheckResult(
            asset_key=key,
            check_name=finding.check,
            passed=finding.outcome == "passed" or finding.waived_by is not None,
            severity=dg.AssetCheckSeverity(finding.severity),
            description=finding.description or None,
            metadata=dict(finding.metadata),
        )
        for finding in found
    ]


_SAID = {"passed": "passed", "failed": "FAILED", "undetermined": "UNDETERMINED"}


def _said(item: Published, statements: Statements) -> tuple[Finding, ...]:
    return findings(item.record, statements.about(item.record.record_digest))


def _verdict(check: Check, version: str, item: Published, inputs: Mapping[str, Published]) -> dict[str, Any]:
    """Run a check and return the body of its statement."""
    try:
        verdict = check.run(item, inputs)
    except EvidenceMissing as missing:
        outcome, description, metadata = "undetermined", str(missing), {}
    else:
        outcome, description = "passed" if verdict.passed else "failed", verdict.description
        metadata = dict(verdict.metadata)
    return {
        "check": check.name,
        "version": version,
        "outcome": outcome,
        "blocking": check.blocking,
        "severity": check.severity,
        "description": description,
        "metadata": metadata,
    }


def _stands(before: Finding) -> bool:
    """Whether an earlier word on a check outlives the loss of its evidence."""
    return before.outcome != "undetermined" or before.waived_by is not None


def _kept(before: Finding) -> str:
    if before.waived_by is not None:
        return "a person let it pass"
    return f"its verdict by version {(before.version or 'of an earlier schema')[:12]} stays: {before.outcome}"


def _body(finding: Finding) -> dict[str, Any]:
    """Return a finding as the body of a statement."""
    return {
        "check": finding.check,
        "version": finding.version,
        "outcome": finding.outcome,
        "blocking": finding.blocking,
        "severity": finding.severity,
        "description": finding.description,
        "metadata": dict(finding.metadata),
    }
