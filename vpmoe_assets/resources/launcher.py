"""What a launcher is, and how the one that was asked for is found: by its name, among `launchers/`."""

import importlib
import pkgutil
import sys
from collections.abc import Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, cast

from trainer.contract.status import JOB_NAME
from vpmoe_assets.resources.detached import RECORD_NAME, DetachedJob
from vpmoe_assets.resources.processes import Log

PROGRAM = "trainer"
"""What `python -m` runs. No setting: another program would make other bytes, and no record would name it."""

_PACKAGE = Path(__file__).with_name("launchers")


class LaunchError(RuntimeError):
    """A job cannot be started as asked; the message says what was found and what to do."""


class LauncherNotAvailableError(LaunchError):
    """The launcher that was asked for does not exist."""


@dataclass(frozen=True, kw_only=True)
class Launch:
    """One start of one job.

    Attributes:
        command: Trainer command, such as "train".
        experiment: Experiment that it is for.
        asset: Asset that is being made.
        work_dir: Work directory; `job.json` is in it, `console.txt` will be.
        sources: Directory of the sources that every process of the job runs from: its working directory.
        device: Where tensors live; on "cuda" each rank has one GPU.
        nproc: Number of ranks.
        environment: Whole environment of the job, the launcher's own additions apart; Python finds `sources`
            first in it.
        marker: Random name of this start.
        grace_s: Time that a rank may take to write a checkpoint after a signal, in seconds.
        wait_s: Time to wait for devices that others hold, in seconds.
        dagster_run_id: Run that asks for it, or None.
        arguments: Of the command, beside its job file.
        settings: Of the launcher, as this run asks for them, before what `launchers.toml` says.
    """

    command: str
    experiment: str
    asset: str
    work_dir: Path
    sources: Path
    device: Literal["cpu", "cuda"]
    nproc: int
    environment: Mapping[str, str]
    marker: str
    grace_s: float
    wait_s: float
    dagster_run_id: str | None = None
    arguments: tuple[str, ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)

    @property
    def trainer(self) -> list[str]:
        """The command line of one rank."""
        job = str(self.work_dir / JOB_NAME)
        return [sys.executable, "-m", PROGRAM, self.command, "--job", job, *self.arguments]


class Handle(Protocol):
    """One job, from before it starts: whoever holds the handle can stop it, whatever happens in between."""

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the GPUs that the job has; empty on a CPU."""

    @property
    def attached(self) -> bool:
        """Whether the job was started by an orchestrator that is gone, and is only followed."""

    @property
    def waiting(self) -> bool:
        """Whether no process of the job gets anywhere now, since it waits for its turn."""

    def start(self) -> None:
        """Start the job and return at once; one that is followed is left as it is."""

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
    """Starts jobs in one kind of place. The modules of `launchers/` are such launchers themselves."""

    def reserve(self, launch: Launch, log: Log) -> AbstractContextManager[Handle]:
        """Take what the job needs, and hold it while the block runs; the job itself is not started yet.

        Args:
            launch: The start.
            log: Told what is waited for.

        Raises:
            LaunchError: What it needs is not there, or did not become free in time.
        """


class DetachingLauncher(Launcher, Protocol):
    """One whose jobs outlive their orchestrator; it leaves a `DetachedJob` where they work."""

    def still_there(self, work_dir: Path, record: DetachedJob, environment: Mapping[str, str]) -> bool:
        """Say whether a job on record may still work in its directory.

        Args:
            work_dir: Of the job.
            record: Of the job.
            environment: Of what is asked.

        Raises:
            LaunchError: Nobody can be asked, here or now; the message says why.
        """


def available() -> list[str]:
    """Return the names of the launchers."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_PACKAGE)]))


def find(name: str) -> Launcher:
    """Return the launcher of a name.

    Raises:
        LauncherNotAvailableError: There is none.
    """
    there = available()
    if name not in there:
        quoted = ", ".join(f'"{word}"' for word in there)
        raise LauncherNotAvailableError(
            f'launcher = "{name}" was asked for; available: {quoted}. "local" runs on this machine.'
        )
    return cast(Launcher, importlib.import_module(f"{__package__}.{_PACKAGE.name}.{name}"))


def require_followed(work_dir: Path, name: str, environment: Mapping[str, str]) -> None:
    """Refuse a work directory in which a job is on record that another launcher handed over.

    A record whose job is over is taken away.

    Args:
        work_dir: Of the job that is to be started.
        name: Of its launcher.
        environment: Of what is asked.

    Raises:
        LaunchError: One works there, or nobody can be asked whether it does.
        ValueError: What says so is not a record of a job.
    """
    record = DetachedJob.read(work_dir)
    if record is None or record.launcher == name:
        return
    job = f"job {record.job_id or record.name} of {record.launcher}"
    place = cast(DetachingLauncher, find(record.launcher))
    try:
        there = place.still_there(work_dir, record, environment)
    except LaunchError as error:
        raise LaunchError(
            f"{job} may work in {work_dir}: {error} If that job is gone for good, remove "
            f"{work_dir / RECORD_NAME}."
        ) from error
    if there:
        raise LaunchError(
            f'{job} works in {work_dir}: use launcher = "{record.launcher}", which follows it, or end it.'
        )
    DetachedJob.remove(work_dir)
