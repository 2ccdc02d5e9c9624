"""Shards of one step as tasks of a Ray cluster: `python -m … FD` is the driver, a process of its own.

The orchestrator never joins the cluster itself. Its driver does, is told what to do on a pipe, and ends with
it: the end of its standard input says that it is gone, however it ended. With the driver Ray ends the tasks,
on every machine; a shard's lock keeps who does it again from whatever of them lives a moment longer.
"""

import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import WorkerError
from vpmoe_assets.harmony.pool import Worker, portable
from vpmoe_assets.resources.ray import cluster
from vpmoe_assets.resources.ray.settings import RaySettings

_LOOK_S = 0.5
_BEAT_S = 5.0
_PROVED: set[str] = set()


@dataclass(frozen=True)
class Work:
    """What a driver is told to do.

    Attributes:
        worker: Builds a shard.
        n: Shards.
        scratch: Directory that all machines see, for what tasks say of themselves.
        settings: Of the cluster.
    """

    worker: Worker
    n: int
    scratch: Path
    settings: RaySettings


class Rows:
    """Rows that a task has done, in a file that its driver reads; written once a second at most."""

    def __init__(self, path: Path) -> None:
        self._path, self._rows, self._written = path, 0, 0.0

    def __call__(self, rows: int) -> None:
        """Count `rows` more."""
        self._rows += rows
        if time.monotonic() - self._written >= 1.0:
            self.write()

    def write(self) -> None:
        """Say how many there are."""
        self._written = time.monotonic()
        with suppress(OSError):  # nothing but a display depends on it
            self._path.write_text(str(self._rows), encoding="ascii")


def task(worker: Worker, shard: int, place: cluster.Place, rows: str) -> Any:
    """Build a shard; runs in a process of Ray's, on some machine of the cluster.

    Raises:
        ClusterError: This machine does not see the files, or has other code.
        Exception: What the worker raises.
    """
    if (wrong := _proved(place)) is not None:
        raise cluster.ClusterError(f"{cluster.here()}, a machine of the Ray cluster, {wrong}")
    done = Rows(Path(rows))
    result = worker(shard, done)
    done.write()
    return result


def _proved(place: cluster.Place) -> str | None:
    """Return what is wrong on this machine; a process that has been found right is not asked again."""
    if place.path in _PROVED:
        return None
    if (wrong := place.wrong()) is None:
        _PROVED.add(place.path)
    return wrong


class Driver:
    """Hands shards out and gathers what comes back.

    Args:
        work: To do.
        place: By which machines show that they see the files.
        send: Takes messages for the orchestrator: `("rows", n)`, `("said", text)`.
    """

    def __init__(self, work: Work, place: cluster.Place, send: Callable[[tuple[str, Any]], None]) -> None:
        self.work, self.place, self.send = work, place, send
        self.shown, self.beat = 0, time.monotonic()

    def run(self) -> list[Any]:
        """Return what the worker returned, in the order of shards.

        Raises:
            Exception: What the worker raised.
            WorkerError: A shard's process, or its machine, died more often than is forgiven.
        """
        import ray

        work = self.work
        remote = ray.remote(num_cpus=work.settings.cpus, max_retries=0, scheduling_strategy="SPREAD")(task)
        worker = ray.put(work.worker)

        def begin(shard: int) -> Any:
            return remote.options(name=f"shard {shard:02d}").remote(
                worker, shard, self.place, str(self.rows(shard))
            )

        results: dict[int, Any] = {}
        deaths = dict.fromkeys(range(work.n), 0)
        running = {begin(shard): shard for shard in range(work.n)}
        while running:
            done, _ = ray.wait(list(running), timeout=_LOOK_S)
            for reference in done:
                shard = running.pop(reference)
                try:
                    results[shard] = ray.get(reference)
                except Exception as error:
                    if not cluster.died(error):
                        raise cluster.as_raised(error, f"shard {shard:02d}") from error
                    deaths[shard] += 1
                    self.say_died(shard, deaths[shard], error)
                    running[begin(shard)] = shard
            self.report()
        self.report(all_of_it=True)
        return [results[shard] for shard in range(work.n)]

    def rows(self, shard: int) -> Path:
        """Where a task says how far it is."""
        return self.work.scratch / f"shard_{shard:02d}.rows"

    def say_died(self, shard: int, deaths: int, error: Exception) -> None:
        """Tell of a death; raises if there were too many."""
        retries = self.work.settings.retries
        what = f"shard {shard:02d}: its process or its machine died ({type(error).__name__})"
        if deaths > retries:
            raise WorkerError(
                f"{what}, {deaths} times. Finished shards are kept: run the same command again and it goes "
                "on from there. Where memory is short, [launcher.ray] cpus = 2 puts fewer on a machine"
            ) from error
        self.send(("said", f"{what}; begun again ({deaths} of {retries})"))

    def report(self, *, all_of_it: bool = False) -> None:
        """Pass on how many rows are done; a shard that was begun again is not counted twice."""
        total = 0
        for shard in range(self.work.n):
            with suppress(OSError, ValueError):
                total += int(self.rows(shard).read_text(encoding="ascii"))
        now = time.monotonic()
        if total > self.shown or now - self.beat >= _BEAT_S or all_of_it:
            self.send(("rows", max(0, total - self.shown)))
            self.shown, self.beat = max(total, self.shown), now


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)  # Ray notices at once, and ends what this driver had running


def _main() -> None:
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the orchestrator, which ends its driver
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    connection = Connection(int(sys.argv[1]))
    try:
        work: Work = pickle.loads(connection.recv_bytes())
        work.scratch.mkdir(parents=True, exist_ok=True)
        for old in work.scratch.glob("shard_*.rows"):
            old.unlink(missing_ok=True)
        cluster.connect(work.settings)
        with cluster.shared_place(work.scratch, work.settings) as place:
            results = Driver(work, place, connection.send).run()
        connection.send(("done", results))
    except BaseException as error:
        with suppress(OSError):  # on a full disk the orchestrator is told all the same
            traceback.print_exc()  # into the driver's log: an error of Ray's own says little without
        with suppress(OSError):
            connection.send(("failed", portable(error)))
    cluster.leave()
    os._exit(0)


if __name__ == "__main__":
    # By its name: classes pickled here must not be those of a module called __main__.
    from vpmoe_assets.resources.ray import shards

    shards._main()
