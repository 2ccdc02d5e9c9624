"""Work directory, heartbeat, STATUS and exit codes; nothing here needs torch."""

import json
import logging
import os
import signal
import time
from pathlib import Path

import pytest

from trainer.job.lifecycle import Interrupted, JobError, run_job
from trainer.job.signals import StopRequest
from trainer.job.workdir import WorkDir


class _Job:
    def __init__(self, work_dir: Path) -> None:
        self.work_dir = str(work_dir)


def status(path: Path) -> str:
    return (path / "STATUS").read_text().strip()


def test_the_heartbeat_goes_on_while_the_main_thread_is_busy(tmp_path):
    work = WorkDir(tmp_path)
    work.at("save", 7)
    with work.heartbeat(seconds=0.05):
        before = json.loads((tmp_path / "heartbeat").read_text())
        time.sleep(0.4)
        after = json.loads((tmp_path / "heartbeat").read_text())
    assert after["unix_s"] > before["unix_s"]
    assert (after["phase"], after["iteration"]) == ("save", 7)
    assert after["since_unix_s"] == before["since_unix_s"], "a watcher can tell life from progress"


def test_a_heartbeat_that_cannot_be_written_does_not_end_the_job(tmp_path):
    work = WorkDir(tmp_path / "gone")
    (tmp_path / "gone").rmdir()
    work.beat()


def test_only_rank_0_writes_the_shared_files(tmp_path):
    work = WorkDir(tmp_path, rank=1)
    work.status("running")
    work.beat()
    with work.logging():
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["log.rank_00001.txt"]


def test_the_first_failure_is_the_one_that_is_kept(tmp_path):
    WorkDir(tmp_path, rank=1).fail("disk full\non rank 1")
    WorkDir(tmp_path, rank=0).fail("connection closed by peer")
    assert status(tmp_path) == "failed: disk full on rank 1"


@pytest.mark.parametrize(
    ("error", "code", "expected"),
    [
        (None, 0, "done"),
        (Interrupted("asked to"), 75, "interrupted"),
        (JobError("loss is nan"), 1, "failed: JobError: loss is nan"),
        (ZeroDivisionError("oops"), 1, "failed: ZeroDivisionError: oops"),
    ],
)
def test_every_end_has_its_status_and_exit_code(error, code, expected, tmp_path):
    seen = []

    def work(job, directory, stop):
        seen.append(status(tmp_path))
        if error is not None:
            raise error

    assert run_job(_Job(tmp_path), work) == code  # type: ignore[arg-type]
    assert seen == ["running"]
    assert status(tmp_path) == expected
    assert ("Traceback" in (tmp_path / "log.txt").read_text()) == isinstance(error, ZeroDivisionError)


class _NoException(BaseException):
    """As torch's `CheckpointException`: raised by a library, and no `Exception`."""


def test_an_error_that_is_no_exception_ends_the_job_like_any_other(tmp_path):
    def work(job, directory, stop):
        raise _NoException("ranks: [0]")

    assert run_job(_Job(tmp_path), work) == 1  # type: ignore[arg-type]
    assert status(tmp_path) == "failed: _NoException: ranks: [0]"
    assert "Traceback" in (tmp_path / "log.txt").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(0), SystemExit(3)])
def test_an_exit_goes_on_after_status_has_said_so(error, tmp_path):
    def work(job, directory, stop):
        raise error

    with pytest.raises(type(error)) as found:
        run_job(_Job(tmp_path), work)  # type: ignore[arg-type]
    assert found.value is error
    assert status(tmp_path) == f"failed: {type(error).__name__}: {error}".strip()


def test_torchs_own_checkpoint_error_leaves_a_status(tmp_path):
    from torch.distributed.checkpoint.api import CheckpointException

    def work(job, directory, stop):
        raise CheckpointException("reading", {})

    assert run_job(_Job(tmp_path), work) == 1  # type: ignore[arg-type]
    assert status(tmp_path).startswith("failed: CheckpointException")


def test_a_signal_asks_and_a_second_one_changes_nothing(tmp_path):
    def work(job, directory, stop):
        assert not stop
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        assert stop.received == "SIGTERM"
        assert stop.count == 2
        raise Interrupted("saved")

    before = signal.getsignal(signal.SIGTERM)
    assert run_job(_Job(tmp_path), work) == 75  # type: ignore[arg-type]
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_request_may_come_from_the_program_itself():
    stop = StopRequest()
    stop.request("budget spent")
    assert stop.received == "budget spent"


def test_nothing_that_a_job_says_of_its_failure_holds_a_credential(tmp_path, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "correct-horse-battery")

    def work(job, directory, stop):
        logging.getLogger("trainer").info("signing in with %s", "correct-horse-battery")
        try:
            raise ValueError("https://me:swordfish-9@host")
        except ValueError as error:
            raise RuntimeError("no entry for correct-horse-battery") from error

    assert run_job(_Job(tmp_path), work) == 1  # type: ignore[arg-type]
    assert status(tmp_path) == "failed: RuntimeError: no entry for [redacted]"
    log = (tmp_path / "log.txt").read_text()
    assert "signing in with [redacted]" in log
    assert "ValueError: https://[redacted]@host" in log
    assert not any(word in log for word in ("horse", "swordfish"))
