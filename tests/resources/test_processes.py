"""Ending jobs and reaping what a killed orchestrator left, with real processes."""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import psutil
import pytest

from vpmoe_assets.resources import processes
from vpmoe_assets.resources.process_record import RECORD_NAME, Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import MARKER_ENV, end_job, members, reap, roots, settle

POLITE = """
import signal, sys, time
def leave(number, frame):
    time.sleep({seconds})
    sys.exit(0)
signal.signal(signal.SIGINT, leave)
print("ready", flush=True)
time.sleep(600)
"""
DEAF = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
while True:
    time.sleep(600)
"""
# A torchrun in miniature: a child in a session of its own, which no process group reaches.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=sys.stdout)
sys.exit(child.wait())
"""

Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def marker() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def start(marker: str) -> Iterator[Start]:
    """Starts a marked Python program and waits until it says that it is ready."""
    started: list[subprocess.Popen[bytes]] = []

    def run(program: str, *arguments: str, mark: str = marker) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, MARKER_ENV: mark, "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield run
    for process in started:
        for left in members(process_marker(process)) if process.poll() is None else []:
            left.kill()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


def process_marker(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).environ().get(MARKER_ENV, "")
    return ""


def dead_orchestrator() -> Orchestrator:
    gone = subprocess.Popen(["true"])
    orchestrator = Orchestrator(gone.pid, psutil.Process(gone.pid).create_time())
    gone.wait()
    return orchestrator


def left_behind(marker: str, work: Path, *, run_id: str | None = None, told: bool = False) -> ProcessRecord:
    work.mkdir(parents=True)
    record = ProcessRecord(marker, dead_orchestrator(), (), "vpmoe_stage1", run_id, death_signal=told)
    record.write(work)
    return record


def test_a_polite_job_gets_the_time_that_its_checkpoint_takes(start: Start, marker: str) -> None:
    process = start(POLITE.format(seconds=1.5))
    assert end_job(marker, grace_s=20.0) == "SIGINT"
    assert process.wait() == 0


def test_only_the_root_is_interrupted_and_all_sessions_are_ended(start: Start, marker: str) -> None:
    parent = start(PARENT, DEAF)
    (root,) = roots(members(marker))
    assert root.pid == parent.pid
    assert len({os.getsid(process.pid) for process in members(marker)}) == 2
    assert end_job(marker, grace_s=0.5, terminate_s=0.5) == "SIGKILL"
    assert members(marker) == []


def test_a_deaf_job_is_killed_after_its_grace(start: Start, marker: str) -> None:
    process = start(DEAF)
    messages: list[str] = []
    begun = time.monotonic()
    assert end_job(marker, grace_s=1.0, terminate_s=0.5, log=messages.append) == "SIGKILL"
    assert 1.5 <= time.monotonic() - begun < 10
    assert process.wait() == -signal.SIGKILL
    assert [message.split(":")[0] for message in messages[1:]] == [
        "Still running, now SIGTERM",
        "Still running, now SIGKILL",
    ]


def test_the_stack_of_what_had_to_be_killed_is_printed_on_request(start: Start, marker: str) -> None:
    process = start(DEAF)
    end_job(marker, grace_s=0.0, terminate_s=0.2, stack=True)
    assert process.stderr is not None
    assert b'File "<string>", line 7' in process.stderr.read()


def test_a_helper_does_not_hold_up_the_end(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_HELPERS_S", 0.5)
    start(DEAF)
    rank = start(POLITE.format(seconds=0))
    begun = time.monotonic()
    command = psutil.Process(rank.pid).cmdline()
    assert end_job(marker, command=command, grace_s=300.0, terminate_s=0.5) == "SIGKILL"
    assert time.monotonic() - begun < 30


def test_nothing_is_done_where_nothing_is_left(marker: str) -> None:
    assert end_job(marker, grace_s=60.0) == "none"


def test_processes_of_other_jobs_are_not_touched(start: Start, marker: str) -> None:
    other = start(DEAF, mark="another-job")
    start(POLITE.format(seconds=0))
    end_job(marker, grace_s=10.0)
    assert other.poll() is None


def test_an_interrupt_sent_twice_does_not_cost_the_checkpoint(start: Start, marker: str) -> None:
    process = start(POLITE.format(seconds=1.5))
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    with pytest.raises(KeyboardInterrupt):  # it takes effect, but only when the job has ended
        end_job(marker, grace_s=20.0)
    assert process.wait() == 0
    assert members(marker) == []


def test_a_late_interrupt_hurries_and_still_leaves_nothing(
    start: Start, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "_DEBOUNCE_S", 0.2)
    start(DEAF)
    threading.Timer(0.6, os.kill, (os.getpid(), signal.SIGINT)).start()
    begun = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        end_job(marker, grace_s=300.0, terminate_s=0.3)
    assert time.monotonic() - begun < 30
    assert members(marker) == []


def test_the_former_signal_handlers_are_back_afterwards(start: Start, marker: str) -> None:
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    start(POLITE.format(seconds=0))
    end_job(marker, grace_s=10.0)
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == before


def test_reap_ends_what_a_dead_orchestrator_left(start: Start, marker: str, tmp_path: Path) -> None:
    process = start(POLITE.format(seconds=0))
    work = tmp_path / ".work" / "smoke" / "vpmoe_stage1-01234567"
    left_behind(marker, work)
    (found,) = reap(tmp_path, grace_s=10.0)
    assert (found.work_dir, found.asset, found.processes, found.needed) == (work, "vpmoe_stage1", 1, "SIGINT")
    assert process.wait() == 0
    assert not (work / RECORD_NAME).exists()
    assert reap(tmp_path) == []


def test_a_job_that_was_told_of_the_death_gets_no_second_signal(
    start: Start, marker: str, tmp_path: Path
) -> None:
    start("import time; print('ready', flush=True); time.sleep(1.5)")
    left_behind(marker, tmp_path / ".work" / "smoke" / "x-01234567", told=True)
    (found,) = reap(tmp_path, grace_s=20.0)
    assert (found.processes, found.needed) == (1, "none")


def test_a_recycled_process_id_is_not_killed(start: Start, marker: str, tmp_path: Path) -> None:
    innocent = start(DEAF, mark="innocent")
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    record = left_behind(marker, work)
    replace(record, pid=innocent.pid).write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert (found.processes, found.needed) == (0, "none")
    assert innocent.poll() is None


def test_an_orchestrator_is_known_by_its_start_time_too() -> None:
    this = Orchestrator.this()
    assert this.alive()
    assert not replace(this, started=this.started - 100.0).alive()


def test_a_job_of_a_living_orchestrator_is_left_alone(start: Start, marker: str, tmp_path: Path) -> None:
    process = start(DEAF)
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    replace(left_behind(marker, work), orchestrator=Orchestrator.this()).write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert found.note == f"is being run by process {os.getpid()}"
    assert process.poll() is None
    assert (work / RECORD_NAME).exists()


def test_a_job_of_another_machine_is_left_alone(marker: str, tmp_path: Path) -> None:
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    replace(left_behind(marker, work), host="elsewhere").write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert found.note == "runs or ran on host elsewhere: reap it there"
    assert (work / RECORD_NAME).exists()


def test_after_a_reboot_the_record_is_stale_even_if_the_process_id_is_in_use(
    marker: str, tmp_path: Path
) -> None:
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    replace(left_behind(marker, work), orchestrator=Orchestrator.this(), boot="an earlier one").write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert (found.note, found.processes) == ("", 0)
    assert not (work / RECORD_NAME).exists()


def test_the_dead_run_is_marked_failed_and_its_pool_slot_is_freed(marker: str, tmp_path: Path) -> None:
    (tmp_path / "home").mkdir()
    with dg.DagsterInstance.local_temp(str(tmp_path / "home")) as instance:
        storage = instance.event_log_storage
        storage.set_concurrency_slots("gpu", 1)

        @dg.job
        def nothing() -> None:
            pass

        run = instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTED)
        storage.claim_concurrency_slot("gpu", run.run_id, "vpmoe_stage1")
        assert storage.get_concurrency_info("gpu").active_slot_count == 1
        left_behind(marker, tmp_path / ".work" / "smoke" / "x-01234567", run_id=run.run_id)
        (found,) = reap(tmp_path, grace_s=0.0, instance=instance)
        assert found.run_failed
        assert instance.get_run_by_id(run.run_id).status == dg.DagsterRunStatus.FAILURE
        assert storage.get_concurrency_info("gpu").active_slot_count == 0


def test_a_run_that_dagster_has_forgotten_is_no_obstacle(marker: str, tmp_path: Path) -> None:
    left_behind(marker, tmp_path / ".work" / "smoke" / "x-01234567", run_id=str(uuid.uuid4()))
    (found,) = reap(tmp_path, grace_s=0.0, instance=dg.DagsterInstance.ephemeral())
    assert not found.run_failed


def test_checkpoints_are_not_searched_for_records(marker: str, tmp_path: Path) -> None:
    left_behind(marker, tmp_path / ".work" / "smoke" / "x-01234567" / "checkpoints" / "iter_0000001")
    assert reap(tmp_path) == []


def test_a_foreign_record_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(json.dumps({"schema": "something else"}))
    with pytest.raises(ValueError, match=r"\.process\.json is not a vpmoe\.process/1 record"):
        settle(tmp_path, grace_s=0.0)
