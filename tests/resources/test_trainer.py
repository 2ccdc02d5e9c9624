"""Jobs run through the trainer resource inside real Dagster steps; only the trainer itself is a stand-in."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime

import dagster as dg
import psutil
import pytest

from tests.resources.launched import carrying, failure_message
from trainer.contract.schema.base import parse
from trainer.contract.schema.job import Job
from vpmoe_assets.resources import trainer
from vpmoe_assets.resources.launcher import Launch, available
from vpmoe_assets.resources.launchers import local
from vpmoe_assets.resources.leases import Lease
from vpmoe_assets.resources.process_record import RECORD_NAME, Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import MARKER_ENV, Log
from vpmoe_assets.resources.trainer import TrainerResource

pytestmark = pytest.mark.slow


def test_a_finished_job_gives_its_summary_and_leaves_no_process(run_stand_in, test_id, tmp_path) -> None:
    result, trained = run_stand_in({"steps": 5})
    assert result.success
    assert trained.summary == {"steps": 5, "started_after": 0}
    assert (trained.returncode, trained.resumed_from, trained.reused, trained.devices) == (0, None, False, ())
    assert trained.execution["device"] == "cpu"
    assert (tmp_path / "work" / "output" / "payload" / "weights.bin").exists()
    assert not (tmp_path / "work" / RECORD_NAME).exists()
    assert not carrying(test_id)


def test_the_job_file_is_what_the_trainer_reads_and_names_no_key(run_stand_in, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "very-secret")
    run_stand_in({"steps": 1}, wandb="offline")
    job = parse(Job, json.loads((tmp_path / "work" / "job.json").read_bytes()))
    assert job.inputs["donor"].path == str(tmp_path / "donor")
    assert job.execution.model_dump() == {
        "device": "cpu",
        "nproc": 1,
        "dp": 1,
        "tp": 1,
        "ep": 1,
        "launcher": "local",
        "wandb": "offline",
        "resume": True,
        "verify_resume": True,
        "per_layer_router_metrics": False,
        "teacher_url_env": None,
    }
    for path in (tmp_path / "work").rglob("*"):
        assert path.is_dir() or b"very-secret" not in path.read_bytes(), path


def test_the_curve_and_the_log_reach_dagster_while_it_runs(run_stand_in) -> None:
    instance = dg.DagsterInstance.ephemeral()
    result, _ = run_stand_in({"steps": 12, "step_s": 0.05}, instance=instance)
    observed = [
        event.asset_observation_data.asset_observation for event in result.get_asset_observation_events()
    ]
    assert [o.metadata["step"].value for o in observed] == list(range(1, 13))
    assert observed[3].metadata["train/loss"].value == 2.5
    assert set(observed[0].metadata) == {"step", "train/loss", "lr", "tokens_per_s"}
    order = [event.event_type_value for event in result.all_events]
    assert order.index("ASSET_OBSERVATION") < order.index("ASSET_MATERIALIZATION")
    logs = "".join(entry.user_message for entry in instance.all_logs(result.run_id))
    assert "rank 0 starts after step 0" in logs


def test_a_finished_job_is_not_run_again(run_stand_in, tmp_path) -> None:
    run_stand_in({"steps": 3})
    log = (tmp_path / "work" / "log.txt").read_text()
    _, again = run_stand_in({"steps": 3})
    assert again.reused
    assert again.summary["steps"] == 3
    assert (tmp_path / "work" / "log.txt").read_text() == log


def test_resume_false_runs_a_finished_job_again(run_stand_in, tmp_path) -> None:
    run_stand_in({"steps": 3})
    _, again = run_stand_in({"steps": 3}, resume=False)
    assert not again.reused
    assert (tmp_path / "work" / "log.txt").read_text().count("starts") == 2


def test_a_finished_job_that_lost_its_payload_is_run_again(run_stand_in, tmp_path) -> None:
    run_stand_in({"steps": 3})
    (tmp_path / "work" / "output" / "payload" / "weights.bin").unlink()
    _, again = run_stand_in({"steps": 3})
    assert not again.reused
    assert (tmp_path / "work" / "output" / "payload" / "weights.bin").exists()


def test_a_failed_job_goes_on_from_its_checkpoint(run_stand_in) -> None:
    failed, _ = run_stand_in({"steps": 6, "save_every": 2, "die_at": 5})
    assert "Run it again to go on from the checkpoint of step 4" in failure_message(failed)
    result, trained = run_stand_in({"steps": 6, "save_every": 2})
    assert result.success
    assert (trained.resumed_from, trained.summary["started_after"]) == (4, 4)
    observed = [e.asset_observation_data.asset_observation for e in result.get_asset_observation_events()]
    assert [o.metadata["step"].value for o in observed] == [5, 6]


def test_every_start_of_a_job_is_noted_with_its_end(run_stand_in) -> None:
    run_stand_in({"steps": 6, "save_every": 2, "fail_at": 3})
    run_stand_in({"steps": 6, "save_every": 2, "die_at": 5})
    run_stand_in({"steps": 6, "save_every": 2})
    _, again = run_stand_in({"steps": 6, "save_every": 2})
    assert (again.reused, again.resumed_from) == (True, 4)
    failed, died, done = again.attempts
    assert failed.ended.startswith("failed: made: loss is NaN at step 3.")
    assert died.ended.startswith("failed: made: the trainer ended with exit code 1")
    assert (failed.resumed_from, died.resumed_from, done.resumed_from, done.ended) == (None, 2, 4, "done")
    times = [at for attempt in again.attempts for at in (attempt.started_utc, attempt.ended_utc)]
    assert times == sorted(times)


@pytest.mark.parametrize(
    ("status", "alive_s", "ended"),
    [
        ("running", 7.0, "killed"),
        ("interrupted", 7.0, "interrupted"),
        ("failed: loss is NaN", 7.0, "failed: loss is NaN"),
        ("running", None, "killed"),
    ],
)
def test_a_start_whose_orchestrator_was_killed_ends_with_the_last_that_is_known_of_it(
    run_stand_in, tmp_path, status, alive_s, ended
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    begun = datetime(2026, 1, 31, 12, tzinfo=UTC)
    (work / "attempts.jsonl").write_text(json.dumps({"started_utc": begun.isoformat()}) + "\n")
    (work / "STATUS").write_text(status + "\n")
    (work / "heartbeat").write_text("{}")
    seen = begun.timestamp() + (-60.0 if alive_s is None else alive_s)
    for name in ("STATUS", "heartbeat"):
        os.utime(work / name, (seen, seen))
    _, trained = run_stand_in({"steps": 1})
    killed, done = trained.attempts
    assert killed.ended == ended
    expected = None if alive_s is None else "2026-01-31T12:00:07.000+00:00"
    assert (killed.ended_utc, done.ended) == (expected, "done")


def test_work_of_another_recipe_is_refused(run_stand_in) -> None:
    run_stand_in({"steps": 1})
    result, _ = run_stand_in({"steps": 1}, fingerprint="b" * 64)
    assert "holds work of another recipe" in failure_message(result)


def test_a_reported_failure_gives_its_reason_the_last_lines_and_the_paths(run_stand_in, tmp_path) -> None:
    result, _ = run_stand_in({"steps": 5, "fail_at": 3})
    message = failure_message(result)
    assert "made: loss is NaN at step 3. There is no checkpoint to go on from." in message
    assert "the loss of step 3 is NaN" in message
    assert str(tmp_path / "work" / "console.txt") in message


def test_a_crash_without_a_word_shows_the_traceback(run_stand_in) -> None:
    result, _ = run_stand_in({"steps": 5, "die_at": 2})
    message = failure_message(result)
    assert "exit code 1 and STATUS 'running'" in message
    assert "RuntimeError: ended without a word" in message


def test_an_empty_deliverable_is_no_success(run_stand_in) -> None:
    result, _ = run_stand_in({"steps": 1, "forget_payload": True})
    assert "left nothing in" in failure_message(result)


def test_a_module_that_cannot_start_is_explained(run_stand_in) -> None:
    result, _ = run_stand_in({"steps": 1}, program="no_such_trainer")
    assert "No module named no_such_trainer" in failure_message(result)


def test_no_setting_changes_the_program_and_only_launchers_that_exist_are_offered() -> None:
    @dg.asset
    def made(trainer: TrainerResource) -> None: ...

    with pytest.raises(dg.DagsterInvalidConfigError, match='unexpected config entry "module"'):
        dg.materialize(
            [made],
            resources={"trainer": TrainerResource()},
            run_config={"resources": {"trainer": {"config": {"module": "other"}}}},
        )
    offered = TrainerResource.model_fields["launcher"].description
    assert offered == f"What starts the processes: {' or '.join(available())}."


def test_a_job_whose_heart_stops_is_killed_with_its_stack(run_stand_in, test_id, tmp_path) -> None:
    begun = time.monotonic()
    result, _ = run_stand_in({"steps": 5, "hang_at": 2, "helper": True}, stall_timeout_s=4.0, grace_s=1.0)
    message = failure_message(result)
    assert "no heartbeat for" in message
    assert "stall_timeout_s = 4" in message
    assert "in hang" in message  # the stack says where
    assert not carrying(test_id)
    assert time.monotonic() - begun < 40


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"device": "cuda"}, r'nproc = 1 asks for 1 GPU.*found 0.*device = "cpu"'),
        ({"launcher": "slrm"}, r'launcher = "slrm" was asked for; available: "local", "ray", "slurm"'),
        ({"nproc": 2}, r"nproc = 2, but tp × dp = 1 × 1"),
        ({"wandb": "online"}, r'no API key for api.wandb.ai.*wandb = "offline"'),
        ({"command": "train"}, r"cannot be started.*recipe"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_starts(
    run_stand_in, tmp_path, monkeypatch, settings, message
) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "no-netrc"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    result, _ = run_stand_in({"steps": 1}, **settings)
    assert not (tmp_path / "work" / "console.txt").exists()
    import re

    assert re.search(message, failure_message(result), re.DOTALL)


class Elsewhere:
    """A launcher whose jobs get their devices where they run: here too, with an invented device."""

    class Job(local.LocalHandle):
        devices = ("Far GPU",)

    @contextmanager
    def reserve(self, launch: Launch, log: Log) -> Iterator[local.LocalHandle]:
        yield self.Job(launch, Lease())


def test_a_launcher_that_starts_jobs_elsewhere_needs_no_gpu_here(run_stand_in, monkeypatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    refused, _ = run_stand_in({"steps": 2}, device="cuda")
    assert "asks for 1 GPU(s), one each; found 0" in failure_message(refused)
    monkeypatch.setattr(trainer, "find", lambda name: Elsewhere())
    result, trained = run_stand_in({"steps": 2}, device="cuda", launcher="elsewhere")
    assert result.success, failure_message(result)
    assert trained.devices == ("Far GPU",)
    assert trained.execution["launcher"] == "elsewhere"


def test_a_job_left_by_a_killed_orchestrator_is_ended_before_the_next_starts(
    run_stand_in, tmp_path, test_id
) -> None:
    work = tmp_path / "work"
    work.mkdir()
    rank = subprocess.Popen(["sleep", "600"], env={**os.environ, MARKER_ENV: "left"}, start_new_session=True)
    gone = subprocess.Popen(["true"])
    dead = Orchestrator(gone.pid, psutil.Process(gone.pid).create_time())
    gone.wait()
    ProcessRecord("left", dead, ("x",), "made", None, death_signal=False).write(work)
    result, _ = run_stand_in({"steps": 2})
    assert result.success
    assert rank.wait(5) == -signal.SIGINT


def test_a_job_of_a_living_orchestrator_is_left_alone(run_stand_in, tmp_path, test_id) -> None:
    work = tmp_path / "work"
    work.mkdir()
    other = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
    try:
        living = Orchestrator(other.pid, psutil.Process(other.pid).create_time())
        ProcessRecord("theirs", living, ("x",), "made", None, death_signal=True).write(work)
        result, _ = run_stand_in({"steps": 2})
        assert f"is being run by process {other.pid}" in failure_message(result)
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_two_ranks_meet_and_the_death_of_one_ends_the_other(run_stand_in, test_id, tmp_path) -> None:
    result, _ = run_stand_in(
        {"steps": 2000, "step_s": 0.05, "die_at": 5, "die_rank": 1, "save_s": 0.5}, nproc=2, dp=2
    )
    assert "RuntimeError: ended without a word" in failure_message(result)
    assert (tmp_path / "work" / "STATUS").read_text() == "interrupted\n"  # rank 0 was asked, and saved
    assert list((tmp_path / "work" / "checkpoints").glob("iter_*"))
    assert not carrying(test_id)
