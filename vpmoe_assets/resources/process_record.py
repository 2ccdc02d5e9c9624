"""Who runs a job in a work directory, written down for the case that nobody is left to ask."""

import json
import os
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Self

import psutil

RECORD_NAME = ".process.json"
SCHEMA = "vpmoe.process/2"


def boot_id() -> str:
    """Names this boot of this machine: process ids and start times mean nothing outside it."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except FileNotFoundError:
        return f"boot-{int(psutil.boot_time())}"


@dataclass(frozen=True)
class Orchestrator:
    """The process that executes a Dagster run and starts its jobs.

    Attributes:
        pid: Its id.
        started: Its start time, by which it is told from a later process of the same id.
        host: Machine.
        boot: Boot of that machine.
    """

    pid: int
    started: float
    host: str = field(default_factory=socket.gethostname)
    boot: str = field(default_factory=boot_id)

    @classmethod
    def this(cls) -> Self:
        """Return the record of this process."""
        return cls(os.getpid(), psutil.Process().create_time())

    @property
    def here(self) -> bool:
        """Whether it runs or ran on this machine."""
        return self.host == socket.gethostname()

    @property
    def dead(self) -> bool:
        """Whether it ran on this machine and is gone."""
        return self.here and (self.boot != boot_id() or not self._runs())

    def _runs(self) -> bool:
        try:
            process = psutil.Process(self.pid)
            return (
                process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - self.started) < 0.5
            )
        except psutil.Error:
            return False


@dataclass(frozen=True)
class ProcessRecord:
    """`.process.json` in a work directory while a job runs there: what `vpmoe reap` needs after a crash.

    Attributes:
        marker: What every process of the job carries in its environment.
        orchestrator: Who started it; while that lives, the job is nobody else's business.
        command: The command line, for people.
        asset: Asset that is being made.
        dagster_run_id: Its Dagster run, or None.
        death_signal: Whether the kernel tells the job when the orchestrator dies (Linux).
        pid: Process id of the trainer or of torchrun, for people; None until it is started.
        started_unix_s: When.
    """

    marker: str
    orchestrator: Orchestrator
    command: tuple[str, ...]
    asset: str
    dagster_run_id: str | None
    death_signal: bool
    pid: int | None = None
    started_unix_s: float = field(default_factory=time.time)

    def write(self, work_dir: Path) -> None:
        """Put the record into the work directory; a reader sees all of it or none."""
        scratch = work_dir / f"{RECORD_NAME}.tmp"
        scratch.write_text(json.dumps({"schema": SCHEMA, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        scratch.replace(work_dir / RECORD_NAME)

    @classmethod
    def read(cls, work_dir: Path) -> Self | None:
        """Return the record of a work directory, or None where no job runs or crashed.

        Raises:
            ValueError: The file is not such a record.
        """
        path = work_dir / RECORD_NAME
        try:
            content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            return None
        if content.pop("schema", None) != SCHEMA:
            raise ValueError(
                f"{path} is not a {SCHEMA} record. Look at it, end what it names by hand, and remove it."
            )
        try:
            return cls(
                **{
                    **content,
                    "orchestrator": Orchestrator(**content["orchestrator"]),
                    "command": tuple(content["command"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise ValueError(
                f"{path}: {error}. Look at it, end what it names by hand, and remove it."
            ) from error

    @classmethod
    def remove(cls, work_dir: Path, marker: str) -> None:
        """Take the record of a job away, which has ended; one that was started there since keeps its own."""
        found = cls.read(work_dir)
        if found is not None and found.marker == marker:
            (work_dir / RECORD_NAME).unlink(missing_ok=True)
