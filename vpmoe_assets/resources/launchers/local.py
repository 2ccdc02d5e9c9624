"""Ranks on this machine: one as a plain process, several through torchrun.

One rank needs no torchrun, which would import torch once more (6 to 9 s on two cores) and only watch. Several
meet on loopback, at a port that torchrun's own store binds, so no other program can take it in between. The
job has a session of its own, so a Ctrl-C in the terminal reaches it through the orchestrator alone, and the
kernel tells it when the orchestrator dies: it then writes a checkpoint and exits, and a rank that lost
torchrun does the same. Its GPUs are leased here, because it runs here.
"""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace

from trainer.contract.status import CONSOLE_NAME
from vpmoe_assets.resources import bound, forked
from vpmoe_assets.resources.launcher import Launch
from vpmoe_assets.resources.leases import Lease, lease
from vpmoe_assets.resources.process_record import Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import MARKER_ENV, Log, end_job, members
from vpmoe_assets.resources.warm import STARTS

_ALLOCATION = ":".join(
    f"glibc.malloc.{name}={value}"
    for name, value in {"mmap_max": 0, "trim_threshold": 1 << 40, "top_pad": 1 << 26, "hugetlb": 1}.items()
)
"""How glibc allocates in a job on a CPU (`GLIBC_TUNABLES`; another C library does not read it).

Large tensors are mapped and unmapped one by one by default, and every page of each comes zeroed through a
fault: an eighth of the time of a training step. Here memory that was freed is kept, in huge pages where the
kernel gives them on request. No result depends on it.
"""

BOUND_SIGNAL = "SIGINT"
"""What a job is told when its orchestrator dies: it writes a checkpoint and exits."""


@contextmanager
def reserve(launch: Launch, log: Log) -> Iterator["LocalHandle"]:
    """Lease the job's GPUs for the block; see `vpmoe_assets.resources.launcher.Launcher`.

    Raises:
        NoGpuError: The machine has fewer devices than asked for.
        GpusBusyError: Not enough became free in time.
    """
    gpus = launch.nproc if launch.device == "cuda" else 0
    holder = {"marker": launch.marker, "asset": f"{launch.experiment}/{launch.asset}", "pid": os.getpid()}
    with lease(gpus, holder=holder, wait_s=launch.wait_s, log=log) as leased:
        yield LocalHandle(launch, leased)


@dataclass
class LocalHandle:
    """A job on this machine."""

    launch: Launch
    lease: Lease
    process: subprocess.Popen[bytes] | None = field(default=None)

    @property
    def devices(self) -> tuple[str, ...]:
        """Product names of the leased GPUs."""
        return tuple(gpu.name for gpu in self.lease.gpus)

    @property
    def attached(self) -> bool:
        """False: a job does not outlive its orchestrator here."""
        return False

    @property
    def waiting(self) -> bool:
        """False: what it needs is there before it starts."""
        return False

    @property
    def forkable(self) -> bool:
        """Whether it may be a fork of what has imported what jobs do; see `vpmoe_assets.resources.warm`."""
        return self.launch.device == "cpu" and self.launch.nproc == 1

    def command_line(self) -> list[str]:
        """Return the command line of the first process, where it is not forked."""
        return command_line(self.launch)

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
            **self.lease.environment,
            bound.PARENT_ENV: str(os.getpid()),
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
        if launch.device == "cpu":
            environment.setdefault("GLIBC_TUNABLES", _ALLOCATION)
        link = STARTS.link(launch.sources, environment) if self.forkable else None
        descriptors = [*self.lease.descriptors]  # held as long as any process of the job lives
        with (launch.work_dir / CONSOLE_NAME).open("ab") as console, link or nullcontext():
            if link is not None:
                descriptors.append(link.fileno())
            self.process = subprocess.Popen(
                self.command_line() if link is None else forked_line(launch, link.fileno()),
                cwd=launch.sources,
                env={**environment, MARKER_ENV: launch.marker},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                pass_fds=descriptors,
            )
        replace(record, pid=self.process.pid).write(launch.work_dir)
        if self.forkable:
            ending = bound_to_parent(launch, "SIGTERM")
            STARTS.started(launch.dagster_run_id, launch.sources, environment, ending)

    def poll(self) -> int | None:
        """Return the exit code of the trainer or of torchrun; negative for a signal; None while it runs."""
        return self.process.poll() if self.process else None

    def stop(self, *, grace_s: float, stack: bool = False, log: Log) -> str:
        """See `vpmoe_assets.resources.launcher.Handle`."""
        launch = self.launch
        try:
            return end_job(launch.marker, command=launch.trainer, grace_s=grace_s, stack=stack, log=log)
        finally:  # also when an interrupt that came meanwhile takes effect
            if not members(launch.marker):
                ProcessRecord.remove(launch.work_dir, launch.marker)


def command_line(launch: Launch) -> list[str]:
    """Return the command line of the job's first process."""
    if launch.nproc == 1:
        return [*bound_to_parent(launch, BOUND_SIGNAL), *launch.trainer]
    return [
        *bound_to_parent(launch, BOUND_SIGNAL),
        *(sys.executable, "-m", "vpmoe_assets.resources.torchrun"),
        *("--shutdown-timeout", str(int(launch.grace_s) + 30), "--"),
        *("--nnodes=1", f"--nproc-per-node={launch.nproc}", "--max-restarts=0"),
        *("--rdzv-backend=c10d", "--rdzv-endpoint=127.0.0.1:0", "--local-addr=127.0.0.1"),
        *(f"--rdzv-id={launch.marker}", "--no-python"),
        *bound_to_parent(launch, "SIGTERM"),
        *launch.trainer,
    ]


def forked_line(launch: Launch, link: int) -> list[str]:
    """Return the command line of what has the job forked, and ends as it does.

    Args:
        launch: Of one rank.
        link: Descriptor of `Starts.link`.
    """
    program = launch.sources.joinpath(*forked.__name__.split(".")).with_suffix(".py")
    asks = [sys.executable, "-I", "-S", str(program), str(link)]
    return [*bound_to_parent(launch, BOUND_SIGNAL), *asks, *launch.trainer]


def bound_to_parent(launch: Launch, name: str) -> list[str]:
    """Return what stands before a command that gets a signal when the process that starts it dies."""
    program = launch.sources.joinpath(*bound.__name__.split(".")).with_suffix(".py")
    return [sys.executable, "-I", "-S", str(program), name]
