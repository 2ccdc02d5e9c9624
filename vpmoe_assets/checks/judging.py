"""The checks of published artifacts: run where they have no verdict yet, which becomes a statement.

Verdicts are no part of an artifact. A check that is new or whose code has changed judges what is there; one
that is gone is retired; nothing is ever made again for a check.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

from trainer.contract.canonical import canonical_json
from trainer.contract.credentials import redact
from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.lineage.errors import EvidenceMissing
from vpmoe_assets.lineage.standing import Finding, Outcome, findings
from vpmoe_assets.lineage.statements import KINDS, PROGRAM, Statement, Statements

Log = Callable[[str], None]

_log = logging.getLogger(__name__)

_SAID = {"passed": "passed", "failed": "FAILED", "undetermined": "UNDETERMINED"}


def judge(
    checks: Sequence[Check],
    item: Published,
    inputs: Mapping[str, Published],
    statements: Statements,
    log: Log,
) -> tuple[Finding, ...]:
    """Bring the verdicts about an artifact up to date, and return the last word on each check.

    A check runs where it has not passed by its present code: where it is new or has changed, and once more
    after a failure, for what it blamed may have been outside the artifact, or in itself. Where it judges
    evidence that was cleaned away, the old verdict stays, marked with the version that gave it; without one
    the outcome is undetermined, which blocks, if the check does, until a person lets it pass. A check that
    breaks down has failed.

    Args:
        checks: Of the asset, as the code has them now.
        item: The artifact.
        inputs: What it was made from, by name.
        statements: Of its store.
        log: Told what is found.
    """
    known = {finding.check: finding for finding in _said(item, statements)}
    asset = item.record.asset
    for check in checks:
        before = known.get(check.name)
        if before is not None and _settled(before, check):
            continue
        after = _finding(check, item, inputs)
        # Another run may have judged the same meanwhile.
        statements.append_after(item.record, partial(_still_to_say, item, check, after))
        if after.outcome == "undetermined" and before is not None and _stands(before):
            log(f"{asset}: check {check.name}: {after.description}; {_kept(before)}")
        else:
            log(f"{asset}: check {check.name} {_SAID[after.outcome]}")
    for name in known.keys() - {check.name for check in checks}:
        statements.append_after(item.record, partial(_retired, item, name))
        log(f"{asset}: check {name} is no longer one of this asset's; its verdict counts no more")
    return _said(item, statements)


def _said(item: Published, statements: Statements) -> tuple[Finding, ...]:
    return findings(item.record, statements.about(item.record))


def _settled(before: Finding, check: Check) -> bool:
    """Whether a check has nothing to add to what it said."""
    passed = before.outcome == "passed" and before.version == check.version
    return passed and (before.blocking, before.severity) == (check.blocking, check.severity)


def _finding(check: Check, item: Published, inputs: Mapping[str, Published]) -> Finding:
    """Run a check; what it is not to blame for never ends the step that made the artifact."""
    outcome: Outcome = "undetermined"
    metadata: dict[str, Any] = {}
    try:
        verdict = check.run(item, inputs)
        outcome, description = "passed" if verdict.passed else "failed", verdict.description
        metadata = dict(verdict.metadata)
        canonical_json(metadata)
    except EvidenceMissing as missing:
        description = str(missing)
    except Exception as error:
        _log.warning("%s: check %s broke down", item.record.asset, check.name, exc_info=True)
        outcome, description = "failed", f"the check broke down: {type(error).__name__}: {error}"
        metadata = {}
    return Finding(check.name, outcome, check.blocking, check.severity, description, metadata, check.version)


def _stands(before: Finding) -> bool:
    """Whether an earlier word on a check outlives the loss of its evidence."""
    return before.outcome != "undetermined" or before.waived_by is not None


def _still_to_say(
    item: Published, check: Check, after: Finding, said: tuple[Statement, ...]
) -> list[Statement]:
    """Return what a run of a check adds to what was said so far."""
    before = _last(item, check.name, said)
    if before is not None and after.outcome == "undetermined" and _stands(before):
        return list(_keep(item, check, before, after.description))
    if before is not None and (
        _body(before) == _body(after) or (after.outcome == "passed" and _settled(before, check))
    ):
        return []
    return [Statement.about(item.record, "verdict", _body(after), author=PROGRAM)]


def _keep(item: Published, check: Check, before: Finding, missing: str) -> Iterator[Statement]:
    """State that an old verdict stays, once for each version of the check that found nothing to judge."""
    if before.waived_by is not None:
        return
    if (before.blocking, before.severity) != (check.blocking, check.severity):
        changed = replace(before, blocking=check.blocking, severity=check.severity)
        yield Statement.about(item.record, "verdict", _body(changed), author=PROGRAM)
    elif check.version in (before.version, before.kept_for):
        return
    body = {"check": check.name, "version": check.version, "missing": missing}
    yield Statement.about(item.record, "kept", body, author=PROGRAM)


def _retired(item: Published, name: str, said: tuple[Statement, ...]) -> list[Statement]:
    """State that a check is gone, where its verdict still counts."""
    if _last(item, name, said) is None:
        return []
    return [Statement.about(item.record, "retired", {"check": name}, author=PROGRAM)]


def _last(item: Published, check: str, said: tuple[Statement, ...]) -> Finding | None:
    return next((found for found in findings(item.record, said) if found.check == check), None)


def _kept(before: Finding) -> str:
    if before.waived_by is not None:
        return f"it was {before.note}"
    version = f"version {before.version[:12]}" if before.version else "a record of the earlier schema"
    return f"the verdict of {version} stays: {before.outcome}"


def _body(finding: Finding) -> dict[str, Any]:
    """Return a finding as the body of a statement, as it is once written and read again."""
    body = {key: getattr(finding, key) for key in KINDS["verdict"]}
    return dict(redact({**body, "metadata": dict(finding.metadata)}))
