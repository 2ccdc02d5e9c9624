"""A program that is run as part of a job never outlives it."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from trainer.job.lifecycle import Interrupted
from trainer.surgery.program import ProgramError, run_program


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path / "the_program.py"


def test_output_arguments_and_environment_reach_the_program_and_its_log(module: Path, tmp_path: Path):
    module.write_text("import os, sys; print(sys.argv[1:], os.environ['GIVEN'], __name__, sys.path[0])")
    beats = []
    run_program(
        "the_program",
        ["a", "b c"],
        log=tmp_path / "log",
        environment={"GIVEN": "yes"},
        beat=lambda: beats.append(1),
    )
    assert (tmp_path / "log").read_text() == f"['a', 'b c'] yes __main__ {tmp_path}\n"
    assert beats


def test_a_failure_shows_the_end_of_the_output(module: Path, tmp_path: Path):
    module.write_text("print('10%\\r20%\\rlast words'); raise SystemExit(3)")
    with pytest.raises(ProgramError, match=r"(?s)the_program ended with exit code 3.*:\nlast words$"):
        run_program("the_program", [], log=tmp_path / "log", environment={}, beat=lambda: None)


def test_a_stop_ends_the_program(module: Path, tmp_path: Path):
    module.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    log = tmp_path / "log"

    def beat() -> None:
        if log.read_text().strip():
            raise Interrupted("asked")

    began = time.monotonic()
    with pytest.raises(Interrupted):
        run_program("the_program", [], log=log, environment={}, beat=beat)
    assert not psutil.pid_exists(int(log.read_text()))
    assert time.monotonic() - began < 60


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux's")
def test_the_program_dies_with_a_job_that_is_killed(module: Path, tmp_path: Path):
    module.write_text("import os, time; print(os.getpid(), flush=True); time.sleep(600)")
    log = tmp_path / "log"
    job = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "from pathlib import Path; from trainer.surgery.program import run_program; "
            f"run_program('the_program', [], log=Path({str(log)!r}), environment={{}}, beat=lambda: None)",
        ],
        cwd=Path(__file__).parents[3],
        env={**os.environ, "PYTHONPATH": f"{Path(__file__).parents[3]}:{tmp_path}"},
    )
    try:
        wait_for(lambda: log.is_file() and log.read_text().strip())
        child = psutil.Process(int(log.read_text()))
        os.kill(job.pid, signal.SIGKILL)
        job.wait()
        wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    finally:
        job.kill()
        job.wait()


def wait_for(condition: object, seconds: float = 60) -> None:
    deadline = time.monotonic() + seconds
    while not condition():  # type: ignore[operator]
        assert time.monotonic() < deadline
        time.sleep(0.05)
