"""Jobs of one run share a start: a process beside them imports what every job does, and they are its forks.

It is started with the second job of a run, which shows that there will be more, and ends with this process.
What it cannot serve starts by itself, as every job does without it: a job with another environment or other
sources, and one that comes before everything is imported.
"""

import atexit
import logging
import select
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

_log = logging.getLogger(__name__)

SETTING = "VPMOE_WARM_START"
"""0 in the environment: every job starts by itself."""
_MODULE = "trainer.job.warm"


@dataclass
class _Warm:
    """A process that forks jobs.

    Attributes:
        process: It.
        control: The socket to it.
        suits: Sources and environment of the jobs that it forks.
        ready: Whether it has said that it can.
    """

    process: subprocess.Popen[bytes]
    control: socket.socket
    suits: tuple[Path, Mapping[str, str]]
    ready: bool = False

    def forks(self) -> bool:
        """Whether a job can be forked now."""
        if not self.ready and select.select([self.control], [], [], 0)[0]:
            if not self.control.recv(1):
                raise ConnectionError("it has ended")
            self.ready = True
        return self.ready

    def end(self) -> None:
        """Let it end, and wait for that; jobs at work go on."""
        self.control.close()
        self.process.wait()


@dataclass
class Starts:
    """The starts of jobs by this process.

    Attributes:
        seen: Runs of which a job has started.
        warm: Who forks jobs; None where nobody does.
    """

    seen: set[str] = field(default_factory=set)
    warm: _Warm | None = None

    def link(self, sources: Path, environment: Mapping[str, str]) -> socket.socket | None:
        """Return a socket on which a job can be asked for, see `vpmoe_assets.resources.forked`; None without.

        Args:
            sources: Working directory of the job.
            environment: Of the job, what differs between all jobs left out.
        """
        if self.warm is None or self.warm.suits != (sources, environment):
            return None
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                if self.warm.forks():
                    socket.send_fds(self.warm.control, [b"l"], [theirs.fileno()])
                    return ours
        except OSError as error:
            _log.warning("jobs start by themselves from now on, %s came of what forked them", error)
            self.end()
        ours.close()
        return None

    def started(
        self, run: str | None, sources: Path, environment: Mapping[str, str], bound: Sequence[str]
    ) -> None:
        """Take note of a job that was started, and prepare for the next where there will be one.

        Args:
            run: Dagster's, that it is of; None for none.
            sources: See `link`.
            environment: See `link`.
            bound: What stands before a command that is to end with this process.
        """
        if run is None or sys.platform != "linux" or environment.get(SETTING) == "0":
            return
        if run not in self.seen:
            self.seen.add(run)
        elif self.warm is None or self.warm.suits != (sources, environment):
            self.end()
            self.warm = _start(sources, environment, bound)

    def end(self) -> None:
        """Fork no more jobs."""
        if self.warm is not None:
            self.warm.end()
        self.warm = None


def _start(sources: Path, environment: Mapping[str, str], bound: Sequence[str]) -> _Warm:
    ours, theirs = socket.socketpair()
    with theirs:
        process = subprocess.Popen(
            [*bound, sys.executable, "-m", _MODULE, str(theirs.fileno())],
            cwd=sources,
            env=environment,
            stdin=subprocess.DEVNULL,
            # What is wrong with an import, the job that starts by itself says in its console.
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[theirs.fileno()],
        )
    return _Warm(process, ours, (sources, environment))


STARTS = Starts()
atexit.register(STARTS.end)
