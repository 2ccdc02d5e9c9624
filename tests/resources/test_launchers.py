"""How a job's first process is started, and what binds it to its orchestrator."""

import functools
import os
import signal
import subprocess
import sys
import time
import uuid
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Literal

import psutil
import pytest

from vpmoe_assets.resources import bound, launcher, torchrun
from vpmoe_assets.resources.launcher import Launch, LauncherNotAvailableError, available, find
from vpmoe_assets.resources.launchers import local, ray
from vpmoe_assets.resources.leases import Gpu, GpusBusyError, Lease, lease
from vpmoe_assets.resources.ray.settings import RaySettings
from vpmoe_assets.resources.torchrun import ShutdownTimeoutError, with_shutdown_timeout

ROOT = Path(__file__).resolve().parents[2]
BOUND = [sys.executable, "-I", "-S", str(bound.__file__)]
linux = pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")


def launch(tmp_path: Path, nproc: int, device: Literal["cpu", "cuda"] = "cpu") -> Launch:
    return Launch(
        command="train",
        experiment="smoke",
        asset="vpmoe_stage1",
        work_dir=tmp_path,
        sources=ROOT,
        device=device,
        nproc=nproc,
        environment=dict(os.environ),
        marker=uuid.uuid4().hex,
        grace_s=600.0,
        wait_s=0.0,
    )


def wait_gone(pid: int, seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < deadline, f"{pid} is still there"
        time.sleep(0.05)


def test_one_rank_is_a_plain_process(tmp_path: Path) -> None:
    line = local.command_line(launch(tmp_path, 1))
    assert line[-5:] == ["-m", "trainer", "train", "--job", str(tmp_path / "job.json")]
    assert not any("torchrun" in part for part in line)


def test_several_ranks_go_through_torchrun_which_waits_longer_than_a_checkpoint(tmp_path: Path) -> None:
    line = local.command_line(launch(tmp_path, 8))
    assert "--nproc-per-node=8" in line
    assert "--rdzv-endpoint=127.0.0.1:0" in line
    assert int(line[line.index("--shutdown-timeout") + 1]) > 600


def test_an_unknown_launcher_is_refused_with_a_remedy() -> None:
    with pytest.raises(
        LauncherNotAvailableError, match=r'"slrm" was asked for; available: "local", "ray", "slurm"'
    ):
        find("slrm")


def test_a_launcher_is_found_by_the_name_of_its_module(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert "local" in available()
    assert find("local") is local
    for module in map(find, available()):
        assert callable(module.reserve)
    with pytest.raises(LauncherNotAvailableError, match='available: "local"'):
        find("launcher")  # what says what a launcher is, is none


TWO = [Gpu("GPU-invented-0", "Invented A"), Gpu("GPU-invented-1", "Invented B")]


def test_gpus_are_leased_by_the_launcher_that_runs_here_from_before_the_job_until_after_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(local, "lease", functools.partial(lease, gpus=lambda: TWO))
    (tmp_path / "show.py").write_text("import os; print('sees', os.environ['CUDA_VISIBLE_DEVICES'])\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(launcher, "PROGRAM", "show")
    first, second = (launch(tmp_path, 1, "cuda") for _ in range(2))
    with local.reserve(first, print) as handle:
        assert handle.devices == ("Invented A",)
        busy = pytest.raises(GpusBusyError, match="GPU-invented-0: smoke/vpmoe_stage1")
        with busy, local.reserve(launch(tmp_path, 2, "cuda"), print):
            pytest.fail("both were leased though one is taken")
        with local.reserve(second, print) as other:
            assert other.devices == ("Invented B",)
        handle.start()
        assert handle.process is not None
        assert handle.process.wait(60) == 0
        handle.stop(grace_s=5.0, log=print)
    assert "sees GPU-invented-0" in (tmp_path / "console.txt").read_text()
    with local.reserve(launch(tmp_path, 2, "cuda"), print) as handle:
        assert handle.devices == ("Invented A", "Invented B")


def test_a_job_on_the_cpu_leases_nothing_and_sees_no_gpu(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_gpus() -> list[Gpu]:
        raise AssertionError("nobody asked for a GPU")

    monkeypatch.setattr(local, "lease", functools.partial(lease, gpus=no_gpus))
    with local.reserve(launch(tmp_path, 4), print) as handle:
        assert handle.devices == ()
        assert handle.lease.environment == {"CUDA_VISIBLE_DEVICES": ""}


@linux
@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_a_job_on_the_cpu_keeps_its_memory_unless_the_user_says_how(tmp_path: Path, own: str | None) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "GLIBC_TUNABLES"}
    job = replace(
        launch(tmp_path, 1), environment=environment | ({} if own is None else {"GLIBC_TUNABLES": own})
    )
    with local.reserve(job, print) as handle:
        handle.start()
        assert handle.process is not None
        while not (given := psutil.Process(handle.process.pid).environ()):
            time.sleep(0.01)  # it is just becoming another program
        found = given["GLIBC_TUNABLES"]
        handle.stop(grace_s=5.0, log=print)
    assert found == own if own else "mmap_max=0" in found


def test_a_bound_command_is_the_same_process_with_the_same_exit_code() -> None:
    program = [*BOUND, "SIGTERM", "sh", "-c", "echo $$; exit 7"]
    with subprocess.Popen(program, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert int(process.stdout.read()) == process.pid
    assert process.returncode == 7


@linux
@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_a_bound_command_gets_its_signal_when_the_parent_is_killed(name: str) -> None:
    child = (
        "import signal, sys, time\n"
        f"signal.signal(signal.{name}, lambda n, f: (print('told', flush=True), sys.exit()))\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = f"import subprocess; subprocess.run({[*BOUND, name, sys.executable, '-c', child]!r})"
    with subprocess.Popen([sys.executable, "-c", parent], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        process.kill()
        assert process.stdout.readline() == b"told\n"


@linux
def test_a_command_whose_parent_is_gone_is_not_started() -> None:
    environment = {**os.environ, bound.PARENT_ENV: "1"}
    program = [*BOUND, "SIGTERM", "echo", "ran"]
    ended = subprocess.run(program, env=environment, capture_output=True, text=True, check=False)
    assert ended.returncode == 1
    assert ended.stdout == ""
    assert "which started this one, ended at once" in ended.stderr


def test_signals_that_the_shell_ignores_work_again() -> None:
    # `dagster asset materialize ... &` in a script: SIGINT is ignored, and Python would keep it so.
    show = "import signal; print(signal.getsignal(signal.SIGINT) == signal.SIG_IGN)"
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        plain = subprocess.run([sys.executable, "-c", show], capture_output=True, text=True, check=True)
        program = [*BOUND, "SIGTERM", sys.executable, "-c", show]
        freed = subprocess.run(program, capture_output=True, text=True, check=True)
    finally:
        signal.signal(signal.SIGINT, former)
    assert (plain.stdout, freed.stdout) == ("True\n", "False\n")


def test_a_torch_whose_time_out_cannot_be_lengthened_is_refused() -> None:
    def close(self: object, death_sig: object = None) -> None:
        pass

    with pytest.raises(ShutdownTimeoutError, match=r"nproc = 1"):
        with_shutdown_timeout(close, 600)


def test_the_default_time_out_is_replaced_and_a_given_one_is_kept() -> None:
    seen: list[float] = []

    def close(self: object, death_sig: object = None, timeout: float = 30) -> None:
        seen.append(timeout)

    longer = with_shutdown_timeout(close, 600)
    longer(None)
    longer(None, signal.SIGINT)
    longer(None, signal.SIGINT, 5)
    assert seen == [600, 600, 5]


RANK = """
import os, signal, sys, time
from pathlib import Path

def save(number, frame):
    time.sleep(4)
    Path(f"saved.{os.environ['RANK']}").touch()
    sys.exit(75)

signal.signal(signal.SIGINT, save)
Path(f"ready.{os.environ['RANK']}").touch()
time.sleep(60)
"""


def test_torchrun_waits_for_its_ranks_as_long_as_it_is_told(tmp_path: Path) -> None:
    (tmp_path / "rank.py").write_text(RANK)
    agents = {}
    for seconds in (1, 60):
        here = tmp_path / str(seconds)
        here.mkdir()
        program = [sys.executable, "-m", torchrun.__name__, "--shutdown-timeout", str(seconds), "--"]
        program += ["--nproc-per-node=2", "--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0"]
        with (here / "output").open("wb") as output:
            agents[here] = subprocess.Popen(
                [*program, str(tmp_path / "rank.py")],
                cwd=here,
                env={**os.environ, "PYTHONPATH": str(ROOT)},
                stdout=output,
                stderr=output,
            )
    deadline = time.monotonic() + 200
    for here, agent in agents.items():
        while len(list(here.glob("ready.*"))) < 2:
            assert agent.poll() is None, (here / "output").read_text()
            assert time.monotonic() < deadline
            time.sleep(0.1)
    ranks = [rank.pid for agent in agents.values() for rank in psutil.Process(agent.pid).children()]
    for agent in agents.values():
        agent.send_signal(signal.SIGINT)
    for agent in agents.values():
        agent.wait(60)
    assert {here.name: len(list(here.glob("saved.*"))) for here in agents} == {"1": 0, "60": 2}
    assert len(ranks) == 4
    for rank in ranks:
        wait_gone(rank)


def test_a_job_for_a_cluster_starts_as_its_driver_however_many_came_before(tmp_path, monkeypatch) -> None:
    """Never as a local job, nor as a fork of what starts those."""
    started = []

    def start(command: list[str], **_: Any) -> SimpleNamespace:
        started.append(command)
        return SimpleNamespace(pid=os.getpid())

    monkeypatch.setattr(local.subprocess, "Popen", start)
    monkeypatch.setattr(local, "STARTS", None)
    for number in range(3):
        job = replace(launch(tmp_path, 1), work_dir=tmp_path / str(number), dagster_run_id="run")
        job.work_dir.mkdir()
        ray.RayHandle(job, Lease(), settings=RaySettings()).start()
    assert len(started) == 3
    assert all(line.index("vpmoe_assets.resources.ray.process") < line.index("--") for line in started)
