"""Jobs that are forked: as if each had been started by itself, and none left behind."""

import os
import signal
import sys
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from trainer.contract.status import CONSOLE_NAME
from vpmoe_assets.resources import launcher, warm
from vpmoe_assets.resources.launcher import Launch
from vpmoe_assets.resources.launchers import local
from vpmoe_assets.resources.launchers.local import LocalHandle
from vpmoe_assets.resources.leases import Lease
from vpmoe_assets.resources.processes import MARKER_ENV, members
from vpmoe_assets.resources.warm import SETTING, Starts

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="descriptors of processes are Linux's")

ROOT = Path(__file__).resolve().parents[2]
LOADED = "TEST_LOADED"
"""Names what those who fork have imported, and their jobs import: torch, or what takes no time."""
LIGHT = """
import sys, wave
from trainer.job import warm
warm.load_megatron, warm._OF_OTHERS = (lambda: None), ("numpy",)
warm.main(int(sys.argv[1]))
"""
PROGRAM = f"""
import importlib, os, signal, sys, threading, time
from pathlib import Path
here = Path(sys.argv[3]).parent
print("arguments", sys.argv[1:3], flush=True)
print("marker", os.environ["{MARKER_ENV}"], "in", os.getcwd(), flush=True)
print("it is there:", os.environ["{LOADED}"] in sys.modules, flush=True)
print("ours:", sorted(name for name in sys.modules if name.partition(".")[0] in ("trainer", "vpmoe_assets")))
if __name__ == "__main__":
    loaded = importlib.import_module(os.environ["{LOADED}"])
    if loaded.__name__ == "torch":
        print("sum", loaded.ones(3).sum().item(), loaded.get_num_threads(), threading.active_count())
    caught = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: caught.append(number))
    (here / ".pid").write_text(str(os.getpid()))
    (here / ".pid").rename(here / "pid")
    while not caught and not (here / "end").exists():
        time.sleep(0.02)
    if caught:
        print("caught", signal.Signals(caught[0]).name)
        sys.exit(75)
    sys.exit(int((here / "end").read_text()))
"""


@pytest.fixture
def starts(monkeypatch) -> Iterator[Starts]:
    own = Starts()
    monkeypatch.setattr(local, "STARTS", own)
    yield own
    own.end()


@pytest.fixture
def first(tmp_path, monkeypatch) -> Launch:
    """The first job of a run, of a program that says where it is and ends as a file tells it."""
    (tmp_path / "standing_in.py").write_text(PROGRAM)
    (tmp_path / "warm_standing_in.py").write_text(LIGHT)
    monkeypatch.setattr(launcher, "PROGRAM", "standing_in")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv(LOADED, "torch")
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)  # OpenBLAS has threads then, as in a run of a user's
    monkeypatch.delenv(SETTING, raising=False)
    return Launch(
        command="train",
        experiment="smoke",
        asset="vpmoe_stage1",
        work_dir=tmp_path / "0",
        sources=ROOT,
        device="cpu",
        nproc=1,
        environment=dict(os.environ),
        marker="",
        grace_s=10.0,
        wait_s=0.0,
        dagster_run_id="run",
    )


@pytest.fixture
def light(first, monkeypatch) -> Launch:
    """The same where next to nothing is imported beforehand."""
    monkeypatch.setattr(warm, "_MODULE", "warm_standing_in")
    return replace(first, environment={**first.environment, LOADED: "wave"})


def begun(first: Launch, number: int, **changed) -> LocalHandle:
    """A job that is at work."""
    work = first.work_dir.with_name(str(number))
    work.mkdir()
    handle = LocalHandle(replace(first, work_dir=work, marker=uuid.uuid4().hex, **changed), Lease())
    handle.start()
    until(lambda: (work / "pid").exists() or handle.poll() is not None, handle)
    assert handle.poll() is None, console(handle)
    return handle


def until(done, handle: LocalHandle, seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline, console(handle)
        time.sleep(0.02)


def console(handle: LocalHandle) -> str:
    return (handle.launch.work_dir / CONSOLE_NAME).read_text()


def ended(handle: LocalHandle, code: int) -> str:
    """Let a job end with a code; returns what it said."""
    (handle.launch.work_dir / "end").write_text(str(code))
    until(lambda: handle.poll() is not None, handle)
    assert handle.poll() == code
    return console(handle)


def forked(first: Launch, starts: Starts, number: int) -> tuple[LocalHandle, psutil.Process]:
    """A job that is a fork, and its process."""
    if starts.warm is None:
        for earlier in (100, 101):
            ended(begun(first, earlier), 0)
    deadline = time.monotonic() + 120
    while not starts.warm.forks():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    handle = begun(first, number)
    return handle, psutil.Process(int((handle.launch.work_dir / "pid").read_text()))


def gone(process: psutil.Process, seconds: float = 10.0) -> None:
    psutil.wait_procs([process], timeout=seconds)
    assert not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def said(handle: LocalHandle) -> list[str]:
    marker = handle.launch.marker
    lines = console(handle).replace(marker, "MARKER").splitlines()
    return [line for line in lines if not line.startswith(("it is there", "ours"))]


def test_a_fork_is_as_if_it_had_been_started_by_itself(first, starts) -> None:
    alone = begun(first, 0)
    assert "it is there: False" in ended(alone, 3)
    assert starts.warm is None  # one job is no reason yet
    second = begun(first, 1)
    assert "it is there: False" in ended(second, 0)
    job, process = forked(first, starts, 2)
    assert [child.pid for child in members(job.launch.marker)] == [job.process.pid]
    assert process.pid != job.process.pid
    assert "it is there: True" in ended(job, 3)
    assert said(job) == said(alone)
    # Every job loads that, and it is part of every job's code.
    assert "ours: ['trainer', 'trainer.job', 'trainer.job.startup']" in console(job)
    gone(process)


def test_signals_reach_it_and_it_dies_with_who_asked(light, starts) -> None:
    for number, name in enumerate(("SIGINT", "SIGTERM")):
        job, process = forked(light, starts, number)
        job.process.send_signal(signal.Signals[name])
        until(lambda job=job: job.poll() is not None, job)
        assert job.poll() == 75
        assert f"caught {name}" in console(job)
        gone(process)
    job, process = forked(light, starts, 2)
    assert job.stop(grace_s=10.0, log=print) == "SIGINT"
    gone(process)
    job, process = forked(light, starts, 3)
    job.process.kill()
    gone(process)
    job, process = forked(light, starts, 4)
    process.parent().kill()  # its guardian
    until(lambda: job.poll() is not None, job)
    assert job.poll() == 1
    gone(process)
    job, process = forked(light, starts, 5)
    process.send_signal(signal.SIGABRT)
    until(lambda: job.poll() is not None, job)
    assert job.poll() == -signal.SIGABRT
    assert "Fatal Python error: Aborted" in console(job)


def test_a_job_outlives_who_forked_it_and_others_then_start_by_themselves(light, starts) -> None:
    job, _ = forked(light, starts, 0)
    starts.warm.process.kill()
    starts.warm.process.wait()
    assert "it is there: True" in ended(job, 0)
    assert "it is there: False" in ended(begun(light, 1), 0)


def test_a_job_that_does_not_suit_starts_by_itself(light, starts) -> None:
    job, _ = forked(light, starts, 0)
    ended(job, 0)
    other = begun(light, 1, environment={**light.environment, "OMP_NUM_THREADS": "2"})
    assert "it is there: False" in ended(other, 0)
    assert starts.warm.suits[1]["OMP_NUM_THREADS"] == "2"  # the next one will be of its kind


def test_nobody_forks_where_that_is_not_wanted(light, starts) -> None:
    unwanted = {**light.environment, SETTING: "0"}
    for number in range(3):
        ended(begun(light, number, environment=unwanted), 0)
    assert starts.warm is None


def test_who_forks_ends_with_the_process_that_started_it(light, starts) -> None:
    forked(light, starts, 0)[0].stop(grace_s=10.0, log=print)
    process = starts.warm.process
    starts.end()
    assert process.poll() == 0
