"""Jobs at work, as `vpmoe watch` shows them, from the files that they and their launchers write."""

import dataclasses
import json
import os
import time

import pytest
from click.testing import CliRunner

from vpmoe_assets.cli import main
from vpmoe_assets.resources import shard_progress
from vpmoe_assets.resources.detached import DetachedJob
from vpmoe_assets.resources.process_record import Orchestrator, ProcessRecord
from vpmoe_assets.running.detached import working

SLURM = DetachedJob(
    launcher="slurm",
    name="vpmoe-x",
    job_id="17",
    asset="vpmoe_stage1",
    nproc=16,
    nodes=2,
    device="cuda",
    orchestrator=dataclasses.replace(Orchestrator.this(), host="login"),
    dagster_run_id=None,
)


@pytest.fixture
def area(tmp_path, monkeypatch):
    """Makes a work area with a job: ``area("vpmoe_stage1", status="running", beat_s=3.0)``."""
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path))

    def make(asset, *, status=None, beat_s=None, experiment="smoke"):
        work = tmp_path / ".work" / experiment / f"{asset}-01234567"
        work.mkdir(parents=True)
        (work / "job.json").write_text(json.dumps({"recipe": {"steps": 200}}))
        lines = [
            {"step": 49, "loss": 9.0},
            {"step": 50, "loss": 2.5, "tokens_per_second": 1234.5, "step_ms": 400.0},
        ]
        (work / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 5')
        if status is not None:
            (work / "STATUS").write_text(status + "\n")
        if beat_s is not None:
            (work / "heartbeat").write_text(json.dumps({"phase": "step", "iteration": 51}))
            os.utime(work / "heartbeat", (time.time() - beat_s,) * 2)
        return work

    return make


def test_a_job_at_work_tells_how_far_it_is_and_what_is_left(area, tmp_path):
    work = area("vpmoe_stage1", status="running", beat_s=3.0)
    ProcessRecord("m", Orchestrator.this(), ("train",), "vpmoe_stage1", None, True).write(work)
    area("vpmoe_stage2", status="done", beat_s=3.0)
    area("vpmoe_stage3", status="interrupted", beat_s=500.0)
    (found,) = working(tmp_path)
    assert (found.experiment, found.asset, found.state, found.phase) == (
        "smoke",
        "vpmoe_stage1",
        "running",
        "step",
    )
    assert (found.step, found.steps, found.loss, found.tokens_per_second) == (50, 200, 2.5, 1234.5)
    assert found.left_s == pytest.approx(60.0)
    assert (found.launcher, found.job_id, found.host) == ("local", None, Orchestrator.this().host)
    assert working(tmp_path, "other") == []


def test_a_job_of_a_cluster_is_shown_queued_at_work_and_silent(area, tmp_path):
    work = area("vpmoe_stage1")
    SLURM.write(work)
    (queued,) = working(tmp_path)
    assert (queued.state, queued.launcher, queued.job_id, queued.host) == ("queued", "slurm", "17", "login")
    (work / ".slurm").mkdir()
    (work / ".slurm" / "started").write_text("17 0 node-3\n")
    (work / "STATUS").write_text("running\n")
    (work / "heartbeat").write_text("{}")
    (running,) = working(tmp_path)
    assert (running.state, running.host) == ("running", "node-3")
    os.utime(work / "heartbeat", (time.time() - 300.0,) * 2)
    (silent,) = working(tmp_path)
    assert silent.state == "silent"
    assert silent.silent_s == pytest.approx(300.0, abs=30.0)


def test_watch_prints_a_line_for_each_job_or_says_that_there_is_none(area, tmp_path):
    assert CliRunner().invoke(main, ["watch"]).output == "no job is at work\n"
    assert json.loads(CliRunner().invoke(main, ["watch", "--json"]).output) == []
    SLURM.write(area("vpmoe_stage1", status="running", beat_s=1.0, experiment="full"))
    (tmp_path / ".work" / "full" / "torn-01234567").mkdir()
    (tmp_path / ".work" / "full" / "torn-01234567" / ".detached.json").write_text("{")
    header, line = CliRunner().invoke(main, ["watch", "--once"]).output.splitlines()
    assert header.split() == ["ASSET", "STATE", "STEP", "LOSS", "TOKENS/S", "LEFT", "WHERE", "LAUNCHER"]
    assert line.split() == [
        "full/vpmoe_stage1",
        "step",
        "50/200",
        "2.5",
        "1,234",
        "1",
        "min",
        "0",
        "s",
        "login",
        "slurm",
        "17",
    ]
    (told,) = json.loads(CliRunner().invoke(main, ["watch", "--json", "-e", "full"]).output)
    assert (told["asset"], told["step"], told["left_s"]) == ("vpmoe_stage1", 50, 60.0)


def test_shards_at_work_tell_rows_pace_and_engine_until_they_are_done(tmp_path, monkeypatch):
    work = tmp_path / ".work" / "smoke" / "synth_kd_v1-01234567"
    work.mkdir(parents=True)
    clock = [100.0]
    monkeypatch.setattr(shard_progress.time, "monotonic", lambda: clock[0])
    with shard_progress.ShardProgress("synth_kd_v1", 2000, work, "ray") as progress:
        for _ in range(10):
            clock[0] += 2.0
            progress.advance(100)
        (found,) = working(tmp_path)
        assert (found.asset, found.state, found.step, found.steps) == ("synth_kd_v1", "running", 1000, 2000)
        assert (found.launcher, found.left_s) == ("ray", pytest.approx(20.0))
        os.utime(work / shard_progress.NOTE_NAME, (time.time() - 90,) * 2)
        assert working(tmp_path)[0].state == "silent"
        note = json.loads((work / shard_progress.NOTE_NAME).read_text())
        note["orchestrator"]["boot"] = "another"
        (work / shard_progress.NOTE_NAME).write_text(json.dumps(note))
        assert working(tmp_path) == []  # it was killed
    assert not list(work.iterdir())


def test_shares_of_scores_are_summed_up(area, tmp_path):
    work = area("teacher_topk")
    data = tmp_path / "data"
    data.mkdir()
    splits = {"train": {"rows": 1000}, "valid": {"rows": 100}}
    (data / "manifest.json").write_text(json.dumps({"splits": splits}))
    inputs = {"synth_kd_v1": {"path": str(data / "payload")}}
    (work / "job.json").write_text(
        json.dumps({"command": "score", "recipe": {"subset_fraction": 0.5}, "inputs": inputs})
    )
    for number in range(2):
        place = work / "workers" / str(number)
        place.mkdir(parents=True)
        (place / "STATUS").write_text("running\n")
        (place / "heartbeat").write_text("{}")
        lines = [{"step": step, "conversations": 10, "tokens": 500, "seconds": 2.0} for step in range(5)]
        (place / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (found,) = working(tmp_path)
    assert (found.state, found.phase, found.step) == ("running", "2 of 2 workers", 100)
    assert (found.tokens_per_second, found.left_s) == (500.0, pytest.approx(50.0))
    assert found.launcher == "local"
    (work / "workers" / "1" / ".ray.json").write_text('{"host": "m1", "pid": 1, "gpus": "0"}')
    (work / "workers" / "0" / "STATUS").write_text("done\n")
    (found,) = working(tmp_path)
    assert (found.phase, found.launcher, found.left_s) == ("1 of 2 workers", "ray", pytest.approx(100.0))
