"""Tasks of a Ray cluster: a shard each, on whatever machine has a core free."""

import os
import pickle
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import WorkerError
from vpmoe_assets.harmony.pool import Engine, Progress, Worker
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources.processes import Log
from vpmoe_assets.resources.ray.cluster import require_listening
from vpmoe_assets.resources.ray.settings import RaySettings, ray_settings
from vpmoe_assets.resources.ray.shards import Work

LAUNCHER = "ray"
FOLDER, LOG_NAME = "ray", "driver.log"
_LEAVE_S = 20.0


def engine(
    asked: Mapping[str, Any], scratch: Path, environment: Mapping[str, str], log: Log
) -> Engine | None:
    """Return what runs shards on the cluster; see `vpmoe_assets.resources.shards`.

    Raises:
        ConfigError: A key or value is wrong.
        LauncherNotAvailableError: Ray is not installed.
        ClusterError: Nobody answers at its address.
    """
    settings = ray_settings(asked, environment)
    require_listening(settings)
    return RayEngine(settings, scratch / FOLDER, dict(environment), log)


@dataclass(frozen=True)
class RayEngine:
    """Runs shards on a cluster, through a driver that ends with this process.

    Attributes:
        settings: Of the cluster.
        scratch: Directory that all its machines see.
        environment: Of the driver.
        log: Told of tasks that died and are begun again.
    """

    settings: RaySettings
    scratch: Path
    environment: Mapping[str, str]
    log: Log

    def __call__(self, worker: Worker, n: int, progress: Progress | None = None) -> list[Any]:
        """Run `worker` for shards 0 to n-1 and return their results in that order.

        Raises:
            Exception: What the worker raised, as it raised it.
            ClusterError: The cluster cannot be used as asked.
            WorkerError: The driver died, or a task more often than is forgiven.
        """
        ours, theirs = Pipe()
        self.scratch.mkdir(parents=True, exist_ok=True)
        with (self.scratch / LOG_NAME).open("wb") as output:
            driver = subprocess.Popen(
                [sys.executable, "-P", "-m", "vpmoe_assets.resources.ray.shards", str(theirs.fileno())],
                stdin=subprocess.PIPE,  # never written to: its end tells the driver that this process is gone
                stdout=output,
                stderr=output,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
                env={
                    **self.environment,
                    "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
                },
            )
        theirs.close()
        try:
            with suppress(OSError):  # a driver that is already dead is reported below
                ours.send_bytes(pickle.dumps(Work(worker, n, self.scratch, self.settings)))
            return self._results(driver, ours, progress)
        finally:
            self._end(driver, ours)

    def _results(
        self, driver: "subprocess.Popen[bytes]", connection: Connection, progress: Progress | None
    ) -> list[Any]:
        while True:
            try:
                kind, value = connection.recv()
            except (EOFError, ConnectionError):
                raise WorkerError(
                    f"the driver of the Ray cluster at {self.settings.address} ended with exit code "
                    f"{driver.wait()}: {self._last_line()}. Finished shards are kept: run the same command "
                    "again and it goes on from there"
                ) from None
            if kind == "rows" and progress is not None:
                progress.advance(value)
            elif kind == "said":
                self.log(value)
            elif kind == "failed":
                raise value
            elif kind == "done":
                results: list[Any] = value
                return results

    def _last_line(self) -> str:
        lines = (self.scratch / LOG_NAME).read_text(encoding="utf-8", errors="replace").split("\n")
        return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "it said nothing")

    @staticmethod
    def _end(driver: "subprocess.Popen[bytes]", connection: Connection) -> None:
        connection.close()
        assert driver.stdin is not None
        driver.stdin.close()
        try:
            driver.wait(_LEAVE_S)
        finally:
            driver.kill()
            driver.wait()
