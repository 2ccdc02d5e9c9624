"""Verdicts are brought up to date on what is there; nothing is made again, and nothing ends, for a check."""

import json
from dataclasses import dataclass, replace

import pytest

from tests.assets.graphs import Graph
from tests.lineage.fabricate import publish
from vpmoe_assets.assets.check_results import check_results
from vpmoe_assets.assets.step import asset_key
from vpmoe_assets.build import Published
from vpmoe_assets.checks import data as data_checks
from vpmoe_assets.checks.check import Check
from vpmoe_assets.checks.judging import judge
from vpmoe_assets.checks.rungs import loss_not_diverged, measured
from vpmoe_assets.checks.training import heldout_loss_fell, resume_drift
from vpmoe_assets.lineage.errors import ArtifactBlocked, EvidenceMissing
from vpmoe_assets.lineage.standing import Finding
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.verdict import Verdict

SUMMARY = {
    "resume_drift": 0.0,
    "resume_check": {"state_equal": True},
    "heldout_loss_start": 5.0,
    "heldout_loss_end": 4.0,
    "uniform_loss": 12.2,
    "checks": {"reload": {"passed": True, "description": "all tensors equal", "metadata": {"tensors": 9}}},
}


@dataclass(frozen=True)
class Scripted(Check):
    """A check whose version is given, and that counts how often it runs."""

    code: str = "1" * 64

    @property
    def version(self) -> str:
        return self.code


def check(run, name="rows", *, code="1", blocking=True) -> Scripted:
    return Scripted(name, run, blocking, "Rows are there.", code * 64)


def passes(item, inputs):
    return Verdict(True, "4 of 4", {"rows": (1, 2)})


def fails(item, inputs):
    return Verdict(False, "3 of 4", {"rows": 3})


def no_evidence(item, inputs):
    raise EvidenceMissing("run/summary.json is no longer there")


def breaks_down(item, inputs):
    raise KeyError("router")


class Case:
    """One artifact, its checks as the code has them from time to time, and what was said."""

    def __init__(self, root, **fields):
        self.store = Store(root)
        self.record = publish(self.store, "synth", **fields)
        self.log: list[str] = []

    @property
    def item(self) -> Published:
        return Published(self.record, self.store.directory(self.record))

    def judged(self, *checks: Check) -> dict[str, Finding]:
        found = judge(checks, self.item, {}, self.store.statements, self.log.append)
        return {finding.check: finding for finding in found}

    def said(self) -> list[str]:
        return [statement.kind for statement in self.store.statements.about(self.record)]

    def usable(self) -> bool:
        try:
            self.store.require("smoke", "synth")
        except ArtifactBlocked:
            return False
        return True


@pytest.fixture
def case(tmp_path):
    return Case(tmp_path, blocking_checks=("rows",))


def once(run):
    """A check's function that may run one time only."""
    calls = []

    def counted(item, inputs):
        assert not calls, "it had nothing to add"
        calls.append(item)
        return run(item, inputs)

    return counted


def test_a_check_that_passed_is_not_run_again_until_its_code_changes(case):
    rows = check(once(passes))
    for _ in range(3):
        assert case.judged(rows)["rows"].outcome == "passed"
    assert case.said() == ["verdict"]
    found = case.judged(check(passes, code="2"))["rows"]
    assert found.version == "2" * 64
    assert case.said() == ["verdict", "verdict"]


@pytest.mark.parametrize("run", [passes, fails, breaks_down, no_evidence])
def test_of_two_runs_that_judge_at_once_one_says_it(case, run):
    def meanwhile(item, inputs):
        case.judged(check(run))
        return run(item, inputs)

    case.judged(check(meanwhile))
    assert case.said() == ["verdict"]


def test_two_runs_at_once_retire_a_check_once(case):
    case.judged(check(passes), check(passes, "more"))

    def meanwhile(item, inputs):
        case.judged(check(passes, code="2"))
        return passes(item, inputs)

    case.judged(check(meanwhile, code="2"))
    assert case.said() == ["verdict", "verdict", "verdict", "retired"]


def test_a_verdict_that_another_run_gave_meanwhile_outlives_evidence_that_went_since(case):
    def meanwhile(item, inputs):
        case.judged(check(passes))
        raise EvidenceMissing("run/summary.json is no longer there")

    assert case.judged(check(meanwhile))["rows"].outcome == "passed"
    assert case.said() == ["verdict"]


def test_a_failure_is_said_even_where_another_run_found_nothing(case):
    def meanwhile(item, inputs):
        case.judged(check(passes))
        return Verdict(False, "3 of 4")

    assert case.judged(check(meanwhile))["rows"].outcome == "failed"
    assert case.said() == ["verdict", "verdict"]


def test_an_artifact_whose_process_was_killed_before_its_checks_spoke_is_judged_when_it_is_reused(case):
    assert not case.usable()
    case.judged(check(passes))
    assert case.usable()


def test_a_renamed_check_judges_what_is_there_and_its_old_name_counts_no_more(case):
    case.judged(check(fails))
    assert not case.usable()
    found = case.judged(check(passes, "row_count"))
    assert list(found) == ["row_count"]
    assert case.usable()
    assert case.said() == ["verdict", "verdict", "retired"]
    assert "check rows is no longer one of this asset's" in case.log[-1]


def test_an_added_check_runs_and_a_removed_one_is_retired_once(case):
    rows, more = check(once(passes)), check(once(passes), "more")
    case.judged(rows)
    assert list(case.judged(rows, more)) == ["rows", "more"]
    for _ in range(2):
        assert list(case.judged(more)) == ["more"]
    assert case.said() == ["verdict", "verdict", "retired"]


def test_an_added_blocking_check_that_fails_blocks_what_was_made_before_it(case):
    case.judged(check(passes))
    assert case.usable()
    case.judged(check(passes), check(fails, "more"))
    assert not case.usable()


def test_a_mended_check_frees_what_it_blocked(case):
    assert case.judged(check(fails))["rows"].blocks
    assert not case.usable()
    assert not case.judged(check(passes, code="2"))["rows"].blocks
    assert case.usable()


def test_what_a_failed_check_blamed_may_have_been_outside_so_it_runs_again_and_repeats_nothing(case):
    for _ in range(3):
        case.judged(check(fails))
    assert case.said() == ["verdict"], "the same words are said once"
    assert case.judged(check(passes))["rows"].outcome == "passed"


def test_a_check_that_no_longer_blocks_says_so_without_a_new_version(case):
    case.judged(check(fails))
    found = case.judged(check(fails, blocking=False))["rows"]
    assert (found.blocks, found.severity) == (False, "WARN")
    assert case.usable()


def test_a_blocking_check_without_verdict_and_without_evidence_blocks_until_a_person_accepts(case):
    for _ in range(2):
        found = case.judged(check(no_evidence))["rows"]
        assert (found.outcome, found.blocks) == ("undetermined", True)
    assert case.said() == ["verdict"]
    assert not case.usable()
    waiver = Statement.about(case.record, "waived", {"check": "rows"}, reason="I saw the log", author="ann@x")
    case.store.statements.append(waiver)
    assert case.usable()
    found = case.judged(check(no_evidence, code="2"))["rows"]
    assert "let pass by ann@x" in found.reason
    assert case.usable()
    assert not case.judged(check(fails))["rows"].waived_by, "evidence that turns up again is judged"
    assert not case.usable()


@pytest.mark.parametrize("before", [passes, fails])
def test_where_evidence_was_cleaned_away_the_old_verdict_stays_marked_with_its_version(case, before):
    old = case.judged(check(before))["rows"]
    for _ in range(2):
        found = case.judged(check(no_evidence, code="2"))["rows"]
        assert (found.outcome, found.version) == (old.outcome, "1" * 64)
    assert found.note == "the verdict is that of version 111111111111, for the evidence is gone"
    assert case.said() == ["verdict", "kept"], "said once for each version that could not judge"
    assert case.usable() == (before is passes)
    (shown,) = check_results([found], asset_key(_Tiny, "synth"))
    assert "version 111111111111" in shown.description
    assert shown.metadata["check_version"].value == "1" * 64


class _Tiny:
    name = "tiny"


def test_a_verdict_that_stays_blocks_as_the_check_does_now(case):
    case.judged(check(fails))
    assert not case.usable()
    found = case.judged(check(no_evidence, code="2", blocking=False))["rows"]
    assert (found.outcome, found.version, found.blocks) == ("failed", "1" * 64, False)
    assert case.usable()


def test_a_check_that_breaks_down_has_failed_and_ends_no_step(case):
    found = case.judged(check(breaks_down), check(passes, "more"))
    assert (found["rows"].outcome, found["more"].outcome) == ("failed", "passed")
    assert found["rows"].description == "the check broke down: KeyError: 'router'"
    assert case.judged(check(passes, code="2"), check(passes, "more"))["rows"].outcome == "passed"


def test_checks_of_a_run_judge_what_was_recorded_of_it(tmp_path):
    case = Case(tmp_path, run={"summary.json": json.dumps(SUMMARY).encode()})
    reload = measured("reload", "Read back.", blocking=True)
    mine = (resume_drift, heldout_loss_fell, loss_not_diverged, reload)
    found = case.judged(*mine)
    assert {finding.outcome for finding in found.values()} == {"passed"}
    assert found["heldout_loss_fell"].description == "held-out loss 5.000 → 4.000 nats per token"
    assert found["reload"].metadata == {"tensors": 9}


@pytest.mark.parametrize("how", ["removed", "altered", "silent"])
def test_checks_of_a_run_believe_only_the_evidence_that_was_published(tmp_path, how):
    said = {} if how == "silent" else SUMMARY
    case = Case(tmp_path, run={"summary.json": json.dumps(said).encode()})
    path = case.item.run / "summary.json"
    path.chmod(0o644)
    if how == "removed":
        path.unlink()
    elif how == "altered":
        path.write_text(json.dumps({**SUMMARY, "heldout_loss_end": 1.0}))
    found = case.judged(resume_drift, heldout_loss_fell, loss_not_diverged)
    assert {finding.outcome for finding in found.values()} == {"undetermined"}
    reason = {"removed": "no longer there", "altered": "not what was published", "silent": "says nothing of"}
    assert all(reason[how] in finding.description for finding in found.values())
    assert not case.usable()


# In the graph.


@pytest.fixture
def harmony_check(monkeypatch):
    """Put another check in the place of the one of synth_harmony."""

    def put(**changes) -> None:
        monkeypatch.setattr(data_checks, "harmony_manifest", replace(data_checks.harmony_manifest, **changes))

    return put


def test_renaming_a_check_makes_nothing_again(tiny: Graph, harmony_check):
    before = tiny.latest("synth_harmony")
    harmony_check(name="shards_match_manifest")
    run = tiny.make("synth_harmony", "synth_kd_v1")
    assert run.reused() == {"synth_harmony": True, "synth_kd_v1": True}
    assert tiny.latest("synth_harmony").record_digest == before.record_digest
    assert list(run.checks("synth_harmony")) == ["shards_match_manifest"]
    assert [finding.check for finding in tiny.store.findings(before)] == ["shards_match_manifest"]


def test_a_check_that_becomes_strict_stops_what_is_below_and_mended_frees_it(tiny: Graph, harmony_check):
    harmony_check(run=lambda item, inputs: Verdict(False, "too few", {}), name="strict")
    run = tiny.run("synth_harmony", "synth_kd_v1")
    assert run.started == ["synth_harmony"]
    assert not tiny.run("synth_kd_v1").success
    harmony_check(run=lambda item, inputs: Verdict(True, "enough", {}), name="strict")
    assert tiny.make("synth_harmony", "synth_kd_v1").reused() == {"synth_harmony": True, "synth_kd_v1": True}
