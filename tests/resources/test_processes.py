"""Ending jobs, with real processes."""

import os
import signal
import threading
import time

import psutil
import pytest

from tests.resources.marked import DEAF, PARENT, POLITE, Start
from vpmoe_assets.resources import processes
from vpmoe_assets.resources.processes import end_job, members, roots


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
