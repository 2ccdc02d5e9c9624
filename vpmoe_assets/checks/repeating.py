"""Checks of published artifacts run once more, and held against what they said; nothing is stated.

A verdict binds to the version of its check. So a check runs again where present code is the one that spoke;
where another version spoke, that is said, for another one may well judge otherwise.
"""

from collections.abc import Iterator, Mapping, Sequence

from vpmoe_assets.build import Published
from vpmoe_assets.checks.check import Check
from vpmoe_assets.lineage.errors import EvidenceMissing, LineageError
from vpmoe_assets.lineage.integrity import Problem
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.record import RECORD_NAME, Record
from vpmoe_assets.lineage.standing import Finding
from vpmoe_assets.lineage.store import Store


class RepeatedChecks:
    """Callable with a record; yields checks that passed and fail now, and notes those that did not run.

    Args:
        store: Where records and verdicts are.
        checks: Of each asset, as present code has them.
    """

    def __init__(self, store: Store, checks: Mapping[str, Sequence[Check]]) -> None:
        self._store = store
        self._checks = checks
        self.passed = 0
        """How many ran again and passed."""

    def __call__(self, record: Record) -> Iterator[Problem]:
        """Run the checks of one artifact again."""
        known = {each.name: each for each in self._checks.get(record.asset, ())}
        try:
            said = self._store.findings(record)
        except LineageError:
            return  # statements that were altered; reported where they are
        if not said:
            return
        item = Published(record, self._store.directory(record))
        inputs = self._inputs(record)
        for finding in said:
            yield from self._again(item, inputs, finding, known.get(finding.check))

    def _again(
        self, item: Published, inputs: Mapping[str, Published] | None, finding: Finding, check: Check | None
    ) -> Iterator[Problem]:
        if finding.outcome != "passed":
            yield _of(item, finding, f"{finding.outcome} when it ran: {finding.reason}", note=True)
            return
        if check is None:
            yield _of(item, finding, "not run again: present code has no such check", note=True)
        elif check.version != finding.version:
            yield _of(
                item,
                finding,
                "not run again: another version of it spoke than that of present code",
                note=True,
            )
        elif inputs is None:
            yield _of(item, finding, "not run again: an input is gone", note=True)
        else:
            try:
                verdict = check.run(item, inputs)
            except EvidenceMissing as missing:
                yield _of(item, finding, f"not run again: {missing}", note=True)
            except Exception as error:  # whatever the altered files led it to
                yield _of(item, finding, f"passed before; now it broke down: {type(error).__name__}: {error}")
            else:
                self.passed += verdict.passed
                if not verdict.passed:
                    yield _of(item, finding, f"passed before; now it fails: {verdict.description}")

    def _inputs(self, record: Record) -> dict[str, Published] | None:
        found: dict[str, Published] = {}
        for reference in record.inputs:
            try:
                there = self._store.find(record.experiment, reference.asset, reference.version)
            except (LineageError, FileNotFoundError):
                return None
            if there is None:
                return None
            found[reference.role] = Published(there, self._store.directory(there))
        return found


def _of(item: Published, finding: Finding, message: str, *, note: bool = False) -> Problem:
    said = " ".join(f"check {finding.check}: {message}".split())
    name = version_name(item.record)
    return Problem("check", name, RECORD_NAME, said, "note" if note else "problem")
