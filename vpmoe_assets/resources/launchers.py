"""Ways to start a trainer job. All speak one small protocol; the job itself is told by files."""

import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol

from trainer.contract.status import CONSOLE_NAME, JOB_NAME
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources import bound
from vpmoe_assets.resources.process_record import Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import MARKER_ENV, Log, end_job, members


class LauncherNotAvailableError(RuntimeError):
    """The launcher that was asked for does not exist or cannot work here."""


@dataclass(frozen=True)
class Launch:
    """One start of one job.

    Attributes:
        command: Trainer command, such as "train".
        asset: Asset that is being made.
        work_dir: Work directory; `job.json` is in it, `console.txt` will be.
        nproc: Number of ranks.
        environment: Whole environment of the job.
        marker: Random name of this start.
        grace_s: Time that a rank may take to write a checkpoint after a signal, in seconds.
        descriptors: Open files that the job holds as long as it lives.
        dagster_run_id: Run that asks for it, or None.
        module: What `python -m` runs.
    """

    command: str
    asset: str
    work_dir: Path
    nproc: int
    environment: Mapping[str, str]
    marker: str
    grace_s: float
    descriptors: Sequence[int] = ()
    dagster_run_id: str | None = None
    module: str = "trainer"

    @property
    def trainer(self) -> list[str]:
        """The command line of one rank."""
        return [sys.executable, "-m", self.module, self.command, "--job", str(self.work_dir / JOB_NAME)]


class Handle(Protocol):
    """One job, from before it starts: whoever holds the handle can stop it, whatever happens in between."""

    def start(self) -> None:
        """Start the job and return at once."""

    def poll(self) -> int | None:
        """Return the exit code, or None while the job runs."""

    def stop(self, *, grace_s: float, stack: bool = False, log: Log) -> str:
        """End the job and everything it started, politely first; returns when nothing is left.

        Args:
            grace_s: Time for a last checkpoint, in seconds.
            stack: Asks for the stacks of what has to be killed.
            log: Told what is done.

        Returns:
            The last signal that was needed, or "none".
        """


class Launcher(Protocol):
    """Starts jobs in one kind of place."""

    def handle(self, launch: Launch) -> Handle:
        """Return the handle of a job that is about to be started."""


@dataclass
class LocalHandle:
    """A job on this machine."""

    launch: Launch
    process: subprocess.Popen[bytes] | None = field(default=None)

    def start(self) -> None:
        """Start it; what its processes print goes to `console.txt` in the work directory."""
        launch = self.launch
        record = ProcessRecord(
            marker=launch.marker,
            orchestrator=Orchestrator.this(),
            command=tuple(launch.trainer),
            asset=launch.asset,
            dagster_run_id=launch.dagster_run_id,
            death_signal=sys.platform == "linux",
        )
        # Before the start: whoever dies in between, the marker is enough to find the processes.
        record.write(launch.work_dir)
        environment = {
            **launch.environment,
            MARKER_ENV: launch.marker,
            bound.PARENT_ENV: str(os.getpid()),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        with (launch.work_dir / CONSOLE_NAME).open("ab") as console:
            self.process = subprocess.Popen(
                LocalLauncher.command_line(launch),
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=tuple(launch.descriptors),
            )
        replace(record, pid=self.process.pid).write(launch.work_dir)

    def poll(self) -> int | None:
        """Return the exit code of the trainer or of torchrun; negative for a signal; None while it runs."""
        return self.process.poll() if self.process else None

    def stop(self, *, grace_s: float, stack: bool = False, log: Log) -> str:
        """See `Handle`."""
        launch = self.launch
        try:
            return end_job(launch.marker, command=launch.trainer, grace_s=grace_s, stack=stack, log=log)
        finally:  # also when an interrupt that came meanwhile takes effect
            if not members(launch.marker):
                ProcessRecord.remove(launch.work_dir)


class LocalLauncher:
    """Ranks on this machine: one as a plain process, several through torchrun.

    One rank needs no torchrun, which would import torch once more (6 to 9 s on two cores) and only watch.
    Several meet on loopback, at a port that torchrun's own store binds, so no other program can take it in
    between. The job has a session of its own, so a Ctrl-C in the terminal reaches it through the orchestrator
    alone, and the kernel tells it when the orchestrator dies: it then writes a checkpoint and exits, and a
    rank that lost torchrun does the same.
    """

    def handle(self, launch: Launch) -> LocalHandle:
        """Return the handle of a job that is about to be started."""
        return LocalHandle(launch)

    @staticmethod
    def command_line(launch: Launch) -> list[str]:
        """Return the command line of the job's first process."""
        if launch.nproc == 1:
            return [*_bound("SIGINT"), *launch.trainer]
        return [
            *_bound("SIGINT"),
            *(sys.executable, "-m", "vpmoe_assets.resources.torchrun"),
            *("--shutdown-timeout", str(int(launch.grace_s) + 30), "--"),
            *("--nnodes=1", f"--nproc-per-node={launch.nproc}", "--max-restarts=0"),
            *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
            *(f"--rdzv-id={launch.marker}", "--no-python"),
            *_bound("SIGTERM"),
            *launch.trainer,
        ]


def _bound(name: str) -> list[str]:
    return [sys.executable, "-I", "-S", str(bound.__file__), name]


def launcher(name: str) -> Launcher:
    """Return the launcher of a name.

    Raises:
        LauncherNotAvailableError: There is none.
    """
    if name == "local":
        return LocalLauncher()
    raise LauncherNotAvailableError(
        f'launcher = "{name}" was asked for; available: "local". Start the orchestrator on the machine '
        'with the GPUs (on a cluster: inside an allocation) and use launcher = "local".'
    )
