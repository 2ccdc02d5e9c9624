"""Where an artifact stands with its checks, from its record and the statements about it."""

import pytest

from tests.lineage.fabricate import publish, state_verdict
from vpmoe_assets.lineage.errors import ArtifactBlocked
from vpmoe_assets.lineage.standing import refusal
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def record(store):
    """An artifact that has to pass two checks, of which none has spoken."""
    return publish(store, "synth", blocking_checks=("rows", "sha256"))


def state(store, record, kind, **body):
    return store.statements.append(Statement.about(record, kind, body, reason="a reason", author="ann@here"))


def outcomes(store, record) -> dict[str, str]:
    return {finding.check: finding.outcome for finding in store.findings(record)}


def test_a_blocking_check_that_never_spoke_blocks(store, record):
    assert outcomes(store, record) == {"rows": "undetermined", "sha256": "undetermined"}
    state_verdict(store, record, name="rows", passed=True)
    assert [finding.check for finding in store.blocked_by(record)] == ["sha256"]
    state_verdict(store, record, name="sha256", passed=True)
    assert store.blocked_by(record) == ()


def test_the_last_verdict_counts(store, record):
    for passed in (True, False, True):
        state_verdict(store, record, name="rows", passed=passed)
        assert outcomes(store, record)["rows"] == ("passed" if passed else "failed")


def test_a_check_that_is_gone_says_nothing_until_it_is_back(store, record):
    state_verdict(store, record, name="rows", passed=False)
    state(store, record, "retired", check="rows")
    state(store, record, "retired", check="sha256")
    state(store, record, "retired", check="never heard of")
    assert outcomes(store, record) == {}
    state_verdict(store, record, name="rows", passed=True)
    assert outcomes(store, record) == {"rows": "passed"}


def test_a_person_lets_a_check_without_verdict_pass_and_is_named(store, record):
    waiver = state(store, record, "waived", check="sha256")
    (_, found) = store.findings(record)
    assert (found.outcome, found.waived_by, found.blocks) == ("undetermined", waiver.id, False)
    assert found.reason == f"has not run; let pass by ann@here on {waiver.time[:10]}: a reason"
    state_verdict(store, record, name="sha256", passed=False)
    (_, found) = store.findings(record)
    assert (found.outcome, found.blocks) == ("failed", True), "a verdict outweighs the word of a person"


def test_a_failure_cannot_be_talked_away(store, record):
    state_verdict(store, record, name="rows", passed=False, description="3 of 4")
    state(store, record, "waived", check="rows")
    found = store.findings(record)[0]
    assert (found.outcome, found.waived_by, found.blocks, found.reason) == ("failed", None, True, "3 of 4")


def test_an_old_verdict_that_stays_is_marked_with_its_version(store, record):
    state_verdict(store, record, name="rows", passed=True, version="1" * 64, description="4 of 4")
    state(store, record, "kept", check="rows", version="2" * 64, missing="run/summary.json")
    found = store.findings(record)[0]
    assert (found.outcome, found.version, found.kept_for) == ("passed", "1" * 64, "2" * 64)
    assert found.reason == "4 of 4; the verdict is that of version 111111111111, for the evidence is gone"


def test_a_refusal_says_what_to_do(store, record):
    with pytest.raises(ArtifactBlocked) as refused:
        store.require("smoke", "synth")
    assert str(refused.value) == (
        f"smoke/synth (version {record.version}) is blocked by its checks: rows: has not run; sha256: has "
        "not run. Materialise it again, and its checks judge what is there anew; where their evidence is "
        "gone, `vpmoe accept synth --check rows --because TEXT`"
    )
    state_verdict(store, record, name="rows", passed=False)
    state_verdict(store, record, name="sha256", passed=True)
    assert "vpmoe accept" not in refusal(store.blocked_by(record), "synth"), "a failure is not waived"
