"""Equivalence by statement: a person says that present code and recipe make what a record's own made.

An acceptance is a statement about one record. It binds that record to one exact fingerprint, of one code, one
recipe, the same packages but for those it names, and equal inputs; it is stated from the record's own code,
never from another acceptance, so accepted differences do not add up unseen; and it holds in the record's own
experiment alone. It ends when it is withdrawn, or when making the artifact with what was accepted comes out
different. What was made meanwhile from an artifact that counted by an acceptance names it in its record.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from trainer.contract.canonical import sha256_json
from vpmoe_assets.lineage.adoption import is_adopted
from vpmoe_assets.lineage.difference import Change, Difference
from vpmoe_assets.lineage.errors import StatementError
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.standing import Finding
from vpmoe_assets.lineage.statements import PROGRAM, Statement, Statements
from vpmoe_assets.lineage.store import Store

EARLIER_FINGERPRINT = "vpmoe.fingerprint/1"
EARLIER_RELEASES = {"external:mergekit": "mergekit"}
"""Inputs of schema 1 that are releases of packages."""


@dataclass(frozen=True)
class Acceptance:
    """What a person accepted, and what became of it.

    Attributes:
        statement: The person's.
        ended: By which it was withdrawn or refuted; None while it holds.
        reproduced: By which making it with what was accepted came out the same; None where nobody tried.
    """

    statement: Statement
    ended: Statement | None = None
    reproduced: Statement | None = None

    @property
    def active(self) -> bool:
        """Whether the artifact counts as made by what was accepted."""
        return self.ended is None

    @property
    def fingerprint(self) -> str:
        """That the artifact counts for."""
        return str(self.statement.body["fingerprint"])

    @property
    def difference(self) -> Difference:
        """Between the record's own code, recipe and packages and those that were accepted."""
        return Difference.from_json(self.statement.body["difference"])


@dataclass(frozen=True)
class Named:
    """What a person covers beyond the code, each by its name."""

    recipe: Sequence[str] = ()
    packages: Sequence[str] = ()


def acceptances(statements: Sequence[Statement]) -> tuple[Acceptance, ...]:
    """Return all acceptances among the statements about one record, oldest first."""
    found: dict[str, Acceptance] = {}
    for statement in statements:
        if statement.kind == "accepted":
            found[statement.id] = Acceptance(statement)
        elif statement.kind in ("withdrawn", "refuted"):
            before = found.get(statement.body["statement"])
            if before is not None and (before.ended is None or statement.kind == "refuted"):
                found[before.statement.id] = Acceptance(before.statement, statement, before.reproduced)
        elif statement.kind == "reproduced":
            for before in list(found.values()):
                if before.fingerprint == statement.body["fingerprint"]:
                    found[before.statement.id] = Acceptance(before.statement, before.ended, statement)
    return tuple(found.values())


def acceptances_of(record: Record | Head, statements: Statements) -> tuple[Acceptance, ...]:
    """Return all acceptances of a record, and of those whose files it only names again, oldest first.

    A version that was made the latest once more has a record of its own; the files, the code that made them,
    the experiment and so what a person said of them are the same.
    """
    found = acceptances(statements.about_digest(record.experiment, record.asset, record.record_digest))
    if record.original is None:
        return found
    others = statements.of_asset(record.experiment, record.asset, "accepted")
    linked = [
        known
        for digest, said in others.items()
        if digest != record.record_digest
        for known in acceptances(said)
        if known.statement.body["own"] == record.fingerprint
        and known.statement.body["files_of"] == record.original.record_digest
    ]
    return (*linked, *found)


def active_acceptance(record: Record, statements: Statements, fingerprint: str) -> Acceptance | None:
    """Return the acceptance by which a record counts for a fingerprint, or None."""
    for found in reversed(acceptances_of(record, statements)):
        same_inputs = is_adopted(record) or found.statement.body["inputs"] == recorded_inputs(record)
        if found.active and found.fingerprint == fingerprint and same_inputs:
            return found
    return None


def accepted_version(
    store: Store, experiment: str, asset: str, fingerprint: str
) -> tuple[Record, Acceptance] | None:
    """Return the newest intact version that counts for a fingerprint by an acceptance, or None.

    Args:
        store: Where it lies.
        experiment: Name.
        asset: Name.
        fingerprint: Of present code, recipe and inputs.
    """
    if not (said := store.statements.of_asset(experiment, asset, "accepted")):
        return None
    for head in reversed(store.scan(experiment, asset)[0]):
        if head.record_digest not in said and head.original is None:
            continue
        record = store.record(head)
        found = active_acceptance(record, store.statements, fingerprint)
        if found is not None and store.intact(record):
            return record, found
    return None


def accepting(
    record: Record,
    payload: Mapping[str, Any],
    said: Sequence[Acceptance],
    *,
    reason: str,
    shown_by: Mapping[str, str],
    difference: Difference | None = None,
    named: Named | None = None,
    unknown: Sequence[str] = (),
) -> Statement:
    """Return the statement that present code and recipe make what a record's own made.

    Args:
        record: Of the artifact.
        payload: Of the fingerprint that present code, recipe and inputs have.
        said: What was accepted of the record before.
        reason: A person's.
        shown_by: Where the difference can be looked at: `{"snapshot": sha256}` or `{"commit": sha}`.
        difference: Between the record's own and the present, where it does not follow from both payloads.
        named: Keys of the recipe and packages that the person covers.
        unknown: What cannot be shown, and is taken on the person's word.

    Raises:
        StatementError: It is refused; says why, and what to do.
    """
    name, named = f"{record.asset}@{record.version}", named or Named()
    fingerprint = sha256_json(dict(payload))
    if not reason.strip():
        raise StatementError(f"{name}: say why, with --because")
    if fingerprint == record.fingerprint:
        raise StatementError(f"{name}: present code and recipe are those it was made with; nothing to accept")
    own_inputs, inputs = recorded_inputs(record), payload["inputs"]
    if own_inputs != inputs and not is_adopted(record):  # of one that was adopted, nothing is known
        raise StatementError(f"{name}: its inputs are not the present ones ({_inputs(own_inputs, inputs)})")
    for earlier in said:
        if earlier.fingerprint == fingerprint:
            _refuse_again(name, earlier)
    if difference is None:
        difference = Difference.between(record.fingerprint_payload, payload)
        if not difference:
            raise StatementError(
                f"{name}: what differs from its fingerprint is neither code, recipe nor package"
            )
    _require_named(name, "recipe", "--recipe", difference.recipe, named.recipe)
    _require_named(name, "packages", "--package", difference.packages, named.packages)
    body = {
        "own": record.fingerprint,
        "files_of": record.original.record_digest if record.original else record.record_digest,
        "digest": record.digest,
        "fingerprint": fingerprint,
        "code": sha256_json(dict(payload["sources"])),
        "recipe": sha256_json(dict(payload["recipe"])),
        "packages": dict(payload.get("packages", {})),
        "inputs": dict(inputs),
        "difference": difference.to_json(),
        "shown_by": dict(shown_by),
        "unknown": list(unknown),
    }
    return Statement.about(record, "accepted", body, reason=reason)


def recorded_inputs(record: Record) -> dict[str, str]:
    """Return the digests of an artifact's inputs by role, as its fingerprint has them.

    In schema 1 the release of a program stood among them; now it is one of the packages.
    """
    inputs, earlier = record.fingerprint_payload.get("inputs", {}), has_earlier_fingerprint(record)
    return {role: digest for role, digest in inputs.items() if not (earlier and role in EARLIER_RELEASES)}


def has_earlier_fingerprint(record: Record) -> bool:
    """Whether an artifact was made, if not recorded, by a program of schema 1."""
    return record.fingerprint_payload.get("schema") == EARLIER_FINGERPRINT


def withdrawing(found: Acceptance, *, reason: str) -> Statement:
    """Return the statement that ends an acceptance.

    Raises:
        StatementError: It has ended already, or no reason is given.
    """
    if found.ended is not None:
        by = f"{found.ended.kind} by {found.ended.author} on {found.ended.time[:10]}"
        raise StatementError(f"{found.statement.id[:12]} was {by} already")
    if not reason.strip():
        raise StatementError(f"{found.statement.id[:12]}: say why it is withdrawn, with --because")
    return found.statement.followed_by("withdrawn", {"statement": found.statement.id}, reason=reason)


def waiving(record: Record, found: Sequence[Finding], check: str, *, reason: str) -> Statement:
    """Return the statement by which a person lets a check without verdict pass.

    Args:
        record: Of the artifact.
        found: Where it stands with its checks.
        check: Name of the check.
        reason: A person's.

    Raises:
        StatementError: There is no such check, it gave a verdict, or was let pass already.
    """
    name = f"{record.asset}@{record.version}"
    known = {finding.check: finding for finding in found}
    if check not in known:
        raise StatementError(f"{name} has no check {check!r}; there is: {', '.join(known) or 'none'}")
    finding = known[check]
    if finding.outcome == "failed":
        raise StatementError(
            f"{name}: check {check} failed ({finding.description}); a verdict is not waived: mend the check "
            "or make the artifact again"
        )
    if finding.outcome == "passed":
        raise StatementError(f"{name}: check {check} passed; there is nothing to waive")
    if finding.waived_by is not None:
        raise StatementError(f"{name}: check {check} was {finding.note} already")
    if not reason.strip():
        raise StatementError(f"{name}: say why, with --because")
    return Statement.about(record, "waived", {"check": check, "version": finding.version}, reason=reason)


def settle_acceptances(store: Store, made: Record) -> list[Statement]:
    """Hold every acceptance for a fingerprint against an artifact that was really made with it.

    Where it came out the same, that is stated; where it did not, the acceptance is void.

    Args:
        store: With the records that were accepted, or what was said about them.
        made: Made with its own fingerprint, here or elsewhere; not one that was only accepted for it.

    Returns:
        What was stated.
    """
    stated: list[Statement] = []
    for said in store.statements.of_asset(made.experiment, made.asset, "accepted").values():
        for found in acceptances(said):
            if found.fingerprint != made.fingerprint:
                continue
            same = found.statement.body["digest"] == made.digest
            if found.reproduced is not None if same else _is_refuted(found):
                continue
            body = {
                "statement": found.statement.id,
                "fingerprint": made.fingerprint,
                "digest": made.digest,
                "by": version_name(made),
                "by_record": made.record_digest,
            }
            kind = "reproduced" if same else "refuted"
            stated.append(store.statements.append(found.statement.followed_by(kind, body, author=PROGRAM)))
    return stated


def _is_refuted(found: Acceptance) -> bool:
    return found.ended is not None and found.ended.kind == "refuted"


def _refuse_again(name: str, earlier: Acceptance) -> None:
    if earlier.active:
        raise StatementError(
            f"{name}: accepted already by {earlier.statement.author} on {earlier.statement.time[:10]} "
            f"({earlier.statement.id[:12]})"
        )
    assert earlier.ended is not None
    if earlier.ended.kind == "refuted":
        raise StatementError(
            f"{name}: {earlier.ended.body['by']} was made with present code and recipe and is different "
            f"(digest {earlier.ended.body['digest'][:12]}); what is refuted cannot be accepted"
        )


def _require_named(
    name: str, what: str, option: str, differing: Sequence[Change], named: Sequence[str]
) -> None:
    """Refuse what is not named, and a name that does not differ: it would be a slip of the pen."""
    differing_names = {change.name for change in differing}
    if stray := sorted(set(named) - differing_names):
        known = "; ".join(map(str, differing)) or "nothing"
        raise StatementError(f"{name}: {option} {stray[0]} does not differ; what does: {known}")
    if missing := [change for change in differing if change.name not in set(named)]:
        options = " ".join(f"{option} {change.name}" for change in missing)
        listed = "; ".join(map(str, missing))
        raise StatementError(
            f"{name}: its {what} differ: {listed}. Where that makes no difference, name each: {options}"
        )


def _inputs(own: Mapping[str, str], present: Mapping[str, str]) -> str:
    return "; ".join(
        f"{role} {own.get(role, '(absent)')[:12]} → {present.get(role, '(absent)')[:12]}"
        for role in sorted(own.keys() | present.keys())
        if own.get(role) != present.get(role)
    )
