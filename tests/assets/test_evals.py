"""Evaluations as assets: one job for all that is due, a report an artifact. The measuring is a stand-in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.assets.graphs import PROGRAMS, write_experiment
from tests.lineage.fabricate import publish
from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.assets.evals import SHARED_INPUTS, evals_assets
from vpmoe_assets.evaluation.names import eval_name
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources import launcher
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource

pytestmark = pytest.mark.slow

LADDER = ("vpdense_80_healed", "vpmoe", "vpmoe_stage1")
EVALS = tuple(eval_name(name) for name in LADDER)


class Evals:
    """The evaluation assets over a store of fabricated checkpoints."""

    def __init__(self, directory: Path, name: str = "tiny") -> None:
        file = write_experiment(directory / f"{name}.toml", {'name = "smoke"': f'name = "{name}"'})
        self.name, self.experiment = name, load_experiment(str(file))
        self.store = Store(directory / "artifacts")
        self.instance = dg.DagsterInstance.ephemeral()
        for name in SHARED_INPUTS:
            self.publish(name)
        for name in LADDER:
            self.publish(name)

    def set_environment(self, patch: pytest.MonkeyPatch) -> None:
        patch.setattr(launcher, "PROGRAM", "stand_in_evaluation")
        patch.setenv("PYTHONPATH", str(PROGRAMS))
        patch.setenv("VPMOE_ARTIFACTS", str(self.store.root))
        patch.setenv("VPMOE_LEASE_DIR", str(self.store.root.parent / "leases"))

    def publish(self, asset: str, content: bytes = b"weights") -> Record:
        return publish(
            self.store,
            asset,
            files={"data.bin": content + asset.encode()},
            experiment=self.name,
            metrics={"parameters": 1000, "num_layers": 4},
            details={"tokens": {"total": 640}} if asset == "vpmoe_stage1" else {},
        )

    def run(
        self, *assets: str, raises: bool = True, ladder: Sequence[str] = LADDER, resume: bool = True
    ) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [produced.definition for produced in evals_assets(self.experiment, ladder)],
            selection=[dg.AssetKey([self.name, asset]) for asset in assets],
            instance=self.instance,
            resources={
                "store": StoreResource(),
                "index": IndexResource(),
                "trainer": TrainerResource(poll_s=0.05, wandb="disabled", resume=resume),
            },
            raise_on_error=raises,
        )

    def reused(self, result: dg.ExecuteInProcessResult) -> dict[str, bool]:
        return {
            event.materialization.asset_key.path[-1]: event.materialization.metadata["reused"].value
            for event in result.get_asset_materialization_events()
            if "reused" in event.materialization.metadata
        }

    def latest(self, asset: str) -> Record:
        record = self.store.find(self.name, asset)
        assert record is not None
        return record

    def log(self, asset: str) -> str:
        return (self.store.directory(self.latest(asset)) / "run" / "log.txt").read_text()

    def report(self, checkpoint: str) -> dict[str, Any]:
        payload = self.store.payload(self.latest(eval_name(checkpoint)))
        return json.loads((payload / f"{checkpoint}.json").read_bytes())

    def left(self) -> list[Path]:
        """Work areas that are still there."""
        work = self.store.root / ".work" / self.name
        return sorted(path for path in work.iterdir() if not path.name.startswith("."))

    def failure(self, result: dg.ExecuteInProcessResult) -> str:
        (failure,) = [event for event in result.all_events if event.is_step_failure]
        return str(failure.step_failure_data.user_failure_data.description)

    def shown(self, result: dg.ExecuteInProcessResult, asset: str) -> dict[str, Any]:
        (found,) = [
            event.materialization
            for event in result.get_asset_materialization_events()
            if event.materialization.asset_key.path[-1] == asset
        ]
        return {name: value.value for name, value in found.metadata.items()}


@pytest.fixture
def evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evals:
    made = Evals(tmp_path)
    made.set_environment(monkeypatch)
    return made


def test_all_that_is_due_is_measured_in_one_job_and_published_one_by_one(evals: Evals) -> None:
    result = evals.run(*EVALS)
    assert evals.reused(result) == dict.fromkeys(EVALS, False)
    assert {evals.log(name) for name in EVALS} == {
        f"measures {name} with {', '.join(LADDER)}\n" for name in LADDER
    }
    assert evals.left() == [], "the work areas are cleared once everything is published"
    assert {ref.role for ref in evals.latest("eval_vpmoe").inputs} == {"vpmoe", *SHARED_INPUTS}
    scores = Index(evals.store.root / "index.duckdb").query(
        "SELECT object_asset, correct, total FROM evals WHERE suite = 'core8' AND task = 'piqa' ORDER BY 1"
    )
    assert [row[0] for row in scores.rows] == list(LADDER)
    assert all(total == 20 for *_, total in scores.rows)


def test_what_was_measured_is_reused_and_a_new_checkpoint_measures_itself_alone(evals: Evals) -> None:
    evals.run(*EVALS)
    assert evals.reused(evals.run(*EVALS)) == dict.fromkeys(EVALS, True)
    evals.publish("vpmoe", b"other weights")
    assert evals.reused(evals.run(*EVALS)) == {EVALS[0]: True, EVALS[1]: False, EVALS[2]: True}
    assert evals.log("eval_vpmoe") == "measures vpmoe with vpmoe\n"


def test_one_checkpoint_that_fails_costs_no_other_its_measurement_and_leaves_nothing_behind(
    evals: Evals, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({"broken": ["vpmoe"]}))
    failed = evals.run(*EVALS, raises=False)
    assert not failed.success
    assert evals.reused(failed) == {EVALS[0]: False, EVALS[2]: False}, "what was measured is published"
    assert "vpmoe: its weights are broken. What it has finished is kept;" in evals.failure(failed)
    assert [path.name.rpartition("-")[0] for path in evals.left()] == ["evaluations"], "the log, as evidence"
    monkeypatch.delenv("STAND_IN")
    assert evals.reused(evals.run(*EVALS)) == {EVALS[0]: True, EVALS[1]: False, EVALS[2]: True}
    assert evals.log("eval_vpmoe") == "measures vpmoe with vpmoe\n"
    assert evals.left() == []


def test_what_a_killed_step_had_measured_is_published_by_the_next_one(
    evals: Evals, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill_after_measuring(evals, monkeypatch)
    monkeypatch.setenv("STAND_IN", json.dumps({"broken": list(LADDER)}))  # nothing can be measured again
    assert evals.store.latest("tiny", "eval_vpmoe") is None
    assert evals.reused(evals.run("eval_vpmoe")) == {"eval_vpmoe": False}
    assert evals.log("eval_vpmoe") == f"measures vpmoe with {', '.join(LADDER)}\n"
    assert evals.reused(evals.run(*EVALS)) == {EVALS[0]: False, EVALS[1]: True, EVALS[2]: False}
    assert evals.left() == []


def test_without_resume_what_a_killed_step_had_measured_is_measured_again(
    evals: Evals, monkeypatch: pytest.MonkeyPatch
) -> None:
    _kill_after_measuring(evals, monkeypatch)
    evals.run("eval_vpmoe", resume=False)
    assert evals.log("eval_vpmoe") == "measures vpmoe with vpmoe\n"
    assert len(evals.latest("eval_vpmoe").attempts) == 1


def _kill_after_measuring(evals: Evals, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run all evaluations in a process that ends before anything is published."""
    monkeypatch.setattr(TrainerResource, "run", _killed(TrainerResource.run))
    with pytest.raises(KeyboardInterrupt):
        evals.run(*EVALS)
    monkeypatch.undo()
    evals.set_environment(monkeypatch)


def _killed(run: Any) -> Any:
    """A kill of the orchestrator, just when the job has come to its end."""

    def killed(*arguments: Any, **options: Any) -> Any:
        run(*arguments, **options)
        raise KeyboardInterrupt

    return killed


def test_a_new_first_checkpoint_and_another_order_measure_nothing_again(evals: Evals) -> None:
    evals.run(*EVALS[1:], ladder=LADDER[1:])
    assert evals.reused(evals.run(*EVALS, ladder=LADDER)) == {
        EVALS[0]: False,
        EVALS[1]: True,
        EVALS[2]: True,
    }
    assert evals.log(EVALS[0]) == f"measures {LADDER[0]} with {LADDER[0]}\n"
    turned = tuple(reversed(LADDER))
    assert evals.reused(evals.run(*EVALS, ladder=turned)) == dict.fromkeys(EVALS, True)


def test_what_changed_is_shown_as_things_are_now_and_is_in_no_report(evals: Evals) -> None:
    evals.run(EVALS[1])
    shown = evals.shown(evals.run(EVALS[1]), EVALS[1])
    assert shown["compared_to"] == "nothing: vpdense_80_healed has not been evaluated"
    evals.run(EVALS[0])
    shown = evals.shown(evals.run(EVALS[1]), EVALS[1])
    ours, theirs = (evals.report(name) for name in ("vpmoe", "vpdense_80_healed"))
    assert shown["compared_to"] == "vpdense_80_healed"
    assert shown["core8_change"] == pytest.approx(ours["core8_centered_mean"] - theirs["core8_centered_mean"])
    assert "delta" not in ours
    evals.publish("vpdense_80_healed", b"other weights")
    evals.run(EVALS[0])
    again = evals.run(EVALS[1])
    assert evals.reused(again) == {EVALS[1]: True}
    theirs = evals.report("vpdense_80_healed")
    assert evals.shown(again, EVALS[1])["core8_change"] == pytest.approx(
        ours["core8_centered_mean"] - theirs["core8_centered_mean"]
    )


def test_a_report_that_cannot_be_compared_is_published_and_says_why(evals: Evals) -> None:
    evals.run(*EVALS[:2])
    evals.publish("core8_bundle", b"other questions")
    result = evals.run(EVALS[1])
    assert evals.reused(result) == {EVALS[1]: False}
    assert "asked other questions (config.bundle_digest" in evals.shown(result, EVALS[1])["compared_to"]
    drawn = evals.run("ladder_report", raises=False)
    assert not drawn.success
    assert "evaluate vpdense_80_healed and vpmoe again" in evals.failure(drawn)


def test_a_report_does_not_depend_on_what_else_was_measured_in_its_job(evals: Evals) -> None:
    evals.run(*EVALS)
    together = [evals.latest(name).digest for name in EVALS]
    for name in EVALS:
        (evals.store.root / "tiny" / name).rename(evals.store.root / f"away-{name}")
    for name in EVALS:
        evals.run(name)
    assert [evals.latest(name).digest for name in EVALS] == together


def test_an_experiment_by_another_name_measures_the_same(
    evals: Evals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evals.run(*EVALS, "ladder_report")
    other = Evals(tmp_path, "another_name")
    other.set_environment(monkeypatch)
    other.run(*EVALS, "ladder_report")
    for asset in (*EVALS, "ladder_report"):
        ours, theirs = evals.latest(asset), other.latest(asset)
        assert (theirs.digest, theirs.fingerprint) == (ours.digest, ours.fingerprint)
        for entry in theirs.files:
            content = (other.store.payload(theirs) / entry.path).read_bytes()
            assert b"another_name" not in content
            assert str(tmp_path).encode() not in content


def test_a_record_has_the_time_of_its_own_measurement(evals: Evals, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps({"broken": ["vpmoe"]}))
    evals.run(*EVALS, raises=False)
    monkeypatch.delenv("STAND_IN")
    evals.run(*EVALS)
    first, second = evals.latest(EVALS[0]), evals.latest(EVALS[1])
    for record in (first, second):
        (attempt,) = record.attempts
        assert (record.started_utc, record.finished_utc) == (attempt.started_utc, attempt.ended_utc)
        assert attempt.ended == "done"
    assert first.finished_utc <= second.started_utc


def test_a_checkpoint_that_was_never_made_is_named(evals: Evals) -> None:
    (evals.store.root / "tiny" / "vpmoe").rename(evals.store.root / "away")
    result = evals.run(*EVALS, raises=False)
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "vpmoe were never published" in str(failure.step_failure_data.user_failure_data.description)
    assert evals.store.latest("tiny", EVALS[0]) is None, "nothing is measured before the question is answered"


def test_the_ladder_draws_what_there_is_and_links_the_records(evals: Evals) -> None:
    evals.run(*EVALS[:2])
    evals.run("ladder_report")
    record = evals.latest("ladder_report")
    directory = evals.store.directory(record)
    content: dict[str, Any] = json.loads((directory / "payload" / "ladder.json").read_bytes())
    assert [row["checkpoint"] for row in content["checkpoints"]] == list(LADDER[:2])
    page = (directory / "run" / "ladder.html").read_text()
    vpmoe = evals.latest("vpmoe")
    assert f'href="../../../vpmoe/{vpmoe.version}/.artifact.json"' in page
    assert (directory / "run" / f"../../../vpmoe/{vpmoe.version}/.artifact.json").resolve().is_file()
    evals.run(*EVALS)
    evals.run("ladder_report")
    rows = json.loads((evals.store.payload(evals.latest("ladder_report")) / "ladder.json").read_bytes())
    assert [row["tokens"] for row in rows["checkpoints"]] == [0, 0, 640]
