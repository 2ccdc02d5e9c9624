"""The first training stage as an asset; only the trainer itself is a stand-in."""

import json
import time
from datetime import datetime
from pathlib import Path

import pytest

from tests.assets.graphs import Graph, stand_in_trainer
from vpmoe_assets.lineage.errors import ArtifactBlocked
from vpmoe_assets.lineage.record import Attempt
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def stage(tiny, monkeypatch) -> Graph:
    tiny.resources = {"trainer": stand_in_trainer(monkeypatch, "stand_in_training")}
    return tiny


def ask(monkeypatch: pytest.MonkeyPatch, **what) -> None:
    monkeypatch.setenv("STAND_IN", json.dumps(what))


def test_a_run_is_published_with_its_curve_checkpoints_and_provenance(stage):
    run = stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    assert [entry.path for entry in record.files] == ["config.json", "model.safetensors"]
    kept = {entry.path for entry in record.run_files}
    assert {"log.txt", "metrics.jsonl", "job.json", "summary.json", "checkpoints/iter_0000010/state"} <= kept
    assert "heartbeat" not in kept
    data = stage.latest("synth_kd_v1")
    assert [(r.asset, r.version, r.record_digest) for r in record.inputs] == [
        ("synth_kd_v1", data.version, data.record_digest)
    ]
    assert (record.seed, record.recipe["seed"], record.recipe["steps"]) == (1234, 1234, 10)
    assert record.execution["device"] == "cpu"
    assert record.execution["resumed_from"] is None
    assert (record.metrics["parameters"], record.metrics["num_layers"]) == (1234, 16)
    job = json.loads((stage.store.directory(record) / "run" / "job.json").read_bytes())
    assert job["recipe_fingerprint"] == record.fingerprint
    assert job["inputs"]["synth_kd_v1"]["digest"] == data.digest
    assert job["provenance"]["git_sha"] == record.code.git_sha
    shown = run.metadata("vpmoe_stage1")
    assert shown["curve"].startswith("![loss over steps](data:image/png;base64,")
    assert Path(shown["log"]).read_text() == "starts after step 0\n"
    assert shown["valid_loss"] == 11.0
    observed = [event.asset_observation_data for event in run.events if event.is_asset_observation]
    steps = [data.asset_observation.metadata["step"].value for data in observed]
    assert steps == list(range(1, 11))
    ladder = stage.index.query("SELECT asset, rung, layers, parameters, valid_loss, blocked FROM ladder").rows
    assert ladder == [("vpmoe_stage1", 0, 16, 1234, 11.0, False)]
    assert {name: (check.passed, check.blocking) for name, check in run.checks("vpmoe_stage1").items()} == {
        "weights_complete": (True, True),
        "resume_drift": (True, True),
        "router_alive": (True, True),
        "heldout_loss_fell": (True, False),
    }


def test_a_run_that_was_cut_short_is_recorded_from_its_first_start_and_counts_the_time_it_worked(
    stage, monkeypatch
):
    ask(monkeypatch, die_at=6)
    assert not stage.run("vpmoe_stage1").success
    time.sleep(1.5)
    ask(monkeypatch)
    stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    first, last = record.attempts
    assert (first.resumed_from, last.resumed_from, last.ended) == (None, 5, "done")
    assert first.ended.startswith("failed: vpmoe_stage1: ")
    assert (record.started_utc, record.finished_utc) == (first.started_utc, last.ended_utc)
    ((worked,),) = stage.index.query("SELECT duration_s FROM runs WHERE asset = 'vpmoe_stage1'").rows
    assert worked == pytest.approx(_seconds(first) + _seconds(last))
    between = datetime.fromisoformat(last.ended_utc) - datetime.fromisoformat(first.started_utc)
    assert worked < between.total_seconds() - 1.4


def test_a_job_that_was_finished_before_is_recorded_with_the_time_it_took(stage, monkeypatch):
    real = Store.publish

    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(Store, "publish", killed)
    assert not stage.run("vpmoe_stage1").success
    monkeypatch.setattr(Store, "publish", real)
    monkeypatch.setenv("STAND_IN", json.dumps({"die_at": 1}))  # it is not run again
    stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    (attempt,) = record.attempts
    assert (record.started_utc, record.finished_utc) == (attempt.started_utc, attempt.ended_utc)
    assert _seconds(attempt) > 0.1


def _seconds(attempt: Attempt) -> float:
    begin, end = (datetime.fromisoformat(text) for text in (attempt.started_utc, attempt.ended_utc))
    return (end - begin).total_seconds()


def test_a_run_that_was_made_is_not_trained_again_until_its_seed_changes(stage, graph, monkeypatch):
    """The data may be the same for both seeds, as rows from a folder are; the initial weights are not."""
    stage.make("vpmoe_stage1")
    ask(monkeypatch, die_at=1)
    run = stage.make("vpmoe_stage1")
    assert run.reused() == {"vpmoe_stage1": True}
    ask(monkeypatch)
    first = stage.latest("vpmoe_stage1")
    other = graph({"seed = 1234": "seed = 4321"}, root=stage.root)
    other.resources = stage.resources
    again = other.make("vpmoe_stage1")
    assert again.reused() == {"vpmoe_stage1": False}
    second = other.latest("vpmoe_stage1")
    assert second.seed == 4321
    assert second.inputs == first.inputs
    assert second.digest != first.digest


@pytest.mark.parametrize(
    ("summary", "check", "words"),
    [
        ({"resume_drift": 0.25}, "resume_drift", "largest difference after resuming: 0.25"),
        ({"resume_drift": None, "resume_check": None}, "resume_drift", "did not repeat its last steps"),
        ({"resume_check": {"state_equal": False}}, "resume_drift", "largest difference after resuming: 0"),
        ({"router": {}}, "router_alive", "no router health"),
        ({"router": {"moe/router_agg/experts_active_mean": 1.0}}, "router_alive", "1.0 experts active"),
    ],
)
def test_a_run_that_is_not_what_it_must_be_is_kept_and_blocks(stage, monkeypatch, summary, check, words):
    ask(monkeypatch, summary=summary)
    run = stage.run("vpmoe_stage1")
    assert not run.success
    shown = run.checks("vpmoe_stage1")
    assert [name for name, found in shown.items() if not found.passed] == [check]
    assert words in shown[check].description
    with pytest.raises(ArtifactBlocked, match=check):
        stage.store.require("tiny", "vpmoe_stage1")


def test_a_loss_that_did_not_fall_warns(stage, monkeypatch):
    ask(monkeypatch, summary={"heldout_loss_end": 12.5})
    run = stage.make("vpmoe_stage1")
    found = run.checks("vpmoe_stage1")["heldout_loss_fell"]
    assert (found.passed, found.severity.value) == (False, "WARN")
    assert found.description == "held-out loss 12.200 → 12.500 nats per token"
    assert stage.store.blocked_by(stage.store.require("tiny", "vpmoe_stage1")) == ()


def test_a_trainer_that_dies_leaves_nothing_published_and_goes_on_next_time(stage, monkeypatch):
    ask(monkeypatch, die_at=7)
    failed = stage.run("vpmoe_stage1")
    message = failed.error()
    assert message.startswith("vpmoe_stage1: the trainer ended with exit code 9")
    assert "Run it again to go on from the checkpoint of step 6." in message
    assert stage.store.assets("tiny").count("vpmoe_stage1") == 0
    ask(monkeypatch)
    stage.make("vpmoe_stage1")
    record = stage.latest("vpmoe_stage1")
    assert (record.sequence, record.execution["resumed_from"]) == (1, 6)
    log = stage.store.directory(record) / "run" / "log.txt"
    assert log.read_text() == "starts after step 0\nstarts after step 6\n"
    assert not (stage.root / ".work" / "tiny" / f"vpmoe_stage1-{record.fingerprint[:8]}").exists()
