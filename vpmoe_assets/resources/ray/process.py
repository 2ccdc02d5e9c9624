"""A process on a machine of a Ray cluster, as `srun` is one on Slurm's: `python -m … OPTIONS -- COMMAND …`.

This is the driver, a process of the orchestrator's machine: signals that it gets are passed on, its exit code
is the command's. An actor of Ray's starts the command and waits for it. When the actor's process dies, with
its driver or by itself, the kernel kills the command; a lock, inherited by the command, tells whoever starts
it again on another machine when it is over.
"""

import argparse
import contextlib
import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_text
from trainer.contract.status import (
    CONSOLE_NAME,
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    FAILED,
    INTERRUPTED,
    STATUS_NAME,
    status_line,
)
from vpmoe_assets.errors import DataError
from vpmoe_assets.resources import bound
from vpmoe_assets.resources.processes import MARKER_ENV
from vpmoe_assets.resources.ray import cluster
from vpmoe_assets.resources.ray.placed import PLACED_NAME
from vpmoe_assets.resources.ray.settings import RaySettings

_LOCK_NAME = ".ray.lock"
_LOOK_S = 0.3
_OWN = (MARKER_ENV, bound.PARENT_ENV, "CUDA_VISIBLE_DEVICES")
"""Variables of the driver that are none of the command's."""


class Runner:
    """An actor: one command, on the machine that Ray has chosen."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._said: Any = None
        self._begun, self._ended = threading.Event(), threading.Event()

    def begin(
        self,
        place: cluster.Place,
        command: Sequence[str],
        work_dir: str,
        cwd: str,
        environment: Mapping[str, str],
        patience_s: float,
    ) -> dict[str, Any]:
        """Start the command, once an earlier start of it is over.

        Raises:
            ClusterError: This machine does not see the files, an earlier start does not end, or there is no
                such command.
        """
        if (wrong := place.wrong()) is not None:
            raise cluster.ClusterError(f"{cluster.here()}, a machine of the Ray cluster, {wrong}")
        lock = self._lock(Path(work_dir), patience_s)
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        started = (list(command), Path(work_dir), cwd, {**environment, "CUDA_VISIBLE_DEVICES": gpus}, lock)
        # A thread of its own: the kernel takes the end of the thread that started a process for its parent's.
        threading.Thread(target=self._run, args=started, daemon=True).start()
        self._begun.wait()
        if isinstance(self._said, OSError):
            raise cluster.ClusterError(f"{cluster.here()} cannot start {command[0]}: {self._said}")
        assert self._process is not None
        return {"host": socket.gethostname(), "pid": self._process.pid, "gpus": gpus}

    def end(self) -> int:
        """Return the exit code, when there is one; negative for a signal."""
        self._ended.wait()
        assert isinstance(self._said, int)
        return self._said

    def signal(self, number: int) -> None:
        """Pass a signal on to the command."""
        if self._process is not None and self._process.poll() is None:
            self._process.send_signal(number)

    def _run(
        self, command: list[str], work_dir: Path, cwd: str, environment: Mapping[str, str], lock: int
    ) -> None:
        bind = [sys.executable, "-I", "-S", str(bound.__file__), "SIGKILL"]
        try:
            with (work_dir / CONSOLE_NAME).open("ab") as console:
                self._process = subprocess.Popen(
                    [*bind, *command],
                    cwd=cwd,
                    env={**environment, bound.PARENT_ENV: str(os.getpid())},
                    stdin=subprocess.DEVNULL,
                    stdout=console,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    pass_fds=[lock],
                )
            os.close(lock)
            self._begun.set()
            self._said = self._process.wait()
        except OSError as error:
            self._said = error
            self._begun.set()
        self._ended.set()

    @staticmethod
    def _lock(work_dir: Path, patience_s: float) -> int:
        path = work_dir / _LOCK_NAME
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        deadline = time.monotonic() + patience_s
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return handle
            except BlockingIOError:
                if time.monotonic() >= deadline:
                    os.close(handle)
                    raise cluster.ClusterError(
                        f"{path}: an earlier start of this work does not end; end its process "
                        f"({_placed(work_dir)}) and run this again"
                    ) from None
            time.sleep(0.1)


def _placed(work_dir: Path) -> str:
    with contextlib.suppress(OSError):
        return (work_dir / PLACED_NAME).read_text(encoding="utf-8").strip()
    return "on a machine that is not known"


class Driver:
    """Has a command run in the cluster, until it is over.

    Args:
        options: Of the command line.
        settings: Of the cluster.
    """

    def __init__(self, options: argparse.Namespace, settings: RaySettings) -> None:
        self.options, self.settings = options, settings
        self.work_dir = Path(options.work)
        self.signals: list[int] = []
        self.told = 0
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: object) -> None:
        self.signals.append(number)

    def run(self) -> int:
        """Return the command's exit code.

        Raises:
            DataError: It cannot be run as asked, or died more often than is forgiven.
        """
        cluster.connect(self.settings)
        with cluster.shared_place(
            self.work_dir, self.settings, gpus=self.options.gpus, sources=False
        ) as place:
            deaths = 0
            while True:
                try:
                    return self._once(place)
                except Exception as error:
                    if not cluster.died(error):
                        raise cluster.as_raised(error, "the command") from error
                    if self.signals:
                        return self._interrupted()
                    deaths += 1
                    self._say_died(deaths, error)

    def _once(self, place: cluster.Place) -> int:
        import ray

        options = self.options
        (self.work_dir / PLACED_NAME).unlink(missing_ok=True)
        runner = (
            ray.remote(Runner)
            .options(num_cpus=self.settings.cpus, num_gpus=options.gpus, max_restarts=0, max_concurrency=3)
            .remote()
        )
        environment = {
            name: value
            for name, value in os.environ.items()
            if name not in _OWN and not name.startswith("RAY_")
        }
        try:
            begun = runner.begin.remote(
                place, options.command, options.work, options.cwd, environment, options.grace + 60.0
            )
            deadline = time.monotonic() + options.wait
            while not ray.wait([begun], timeout=_LOOK_S)[0]:
                if self.signals:
                    return self._interrupted()
                if time.monotonic() > deadline:
                    raise cluster.ClusterError(
                        f"no machine of the Ray cluster at {self.settings.address} had "
                        f"{self.settings.cpus:g} cores and {options.gpus} GPUs free within lease_wait_s = "
                        f"{options.wait:g}; give it more time, or fewer workers at once"
                    )
            where = ray.get(begun)
            replace_text(self.work_dir / PLACED_NAME, json.dumps(where) + "\n", durable=False)
            ended = runner.end.remote()
            while not ray.wait([ended], timeout=_LOOK_S)[0]:
                while self.told < len(self.signals):
                    runner.signal.remote(int(self.signals[self.told]))
                    self.told += 1
            return int(ray.get(ended))
        finally:
            with contextlib.suppress(Exception):
                ray.kill(runner)

    def _interrupted(self) -> int:
        replace_text(self.work_dir / STATUS_NAME, status_line(INTERRUPTED))
        return EXIT_INTERRUPTED

    def _say_died(self, deaths: int, error: Exception) -> None:
        retries = self.settings.retries
        what = f"its process or its machine died ({type(error).__name__}; {_placed(self.work_dir)})"
        if deaths > retries:
            raise cluster.ClusterError(f"{what}, {deaths} times; run it again to go on") from error
        print(f"{what}; started again, {deaths} of {retries}", flush=True)


def _main() -> int:
    parser = argparse.ArgumentParser(description="Run a command on a machine of a Ray cluster.")
    parser.add_argument("--settings", required=True, help="[launcher.ray], as JSON")
    parser.add_argument("--work", required=True, help="work directory, which all machines see")
    parser.add_argument("--cwd", required=True, help="working directory of the command")
    parser.add_argument("--gpus", type=int, default=0)
    parser.add_argument("--wait", type=float, required=True, help="longest wait for a machine, in seconds")
    parser.add_argument("--grace", type=float, required=True, help="time for a last checkpoint, in seconds")
    parser.add_argument("command", nargs="+")
    options = parser.parse_args()
    driver = Driver(options, RaySettings.model_validate_json(options.settings))
    try:
        code = driver.run()
    except (DataError, OSError) as error:
        print(f"{type(error).__name__}: {error}", flush=True)
        replace_text(driver.work_dir / STATUS_NAME, status_line(FAILED, str(error)))
        code = EXIT_FAILED
    cluster.leave()
    return code


if __name__ == "__main__":
    # By its name: what is pickled here must not be of a module called __main__.
    from vpmoe_assets.resources.ray import process

    code = process._main()
    if code < 0:  # as the command ended
        signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
        os.kill(os.getpid(), -code)
    os._exit(code)
