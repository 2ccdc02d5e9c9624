"""Several processes of one job that share its work, each started and ended as a job of its own.

Each has a directory of its own below the job's work directory, with the job file that it was started with,
what it printed, and the record by which it is found after a crash.
"""

import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.contract.status import HEARTBEAT_NAME, JOB_NAME, STATUS_NAME
from vpmoe_assets.resources.launcher import Handle, Launch, Launcher
from vpmoe_assets.resources.processes import Log, new_marker
from vpmoe_assets.resources.watcher import Watcher
from vpmoe_assets.resources.worker_places import FOLDER, places


def launches(launch: Launch, workers: int) -> list[Launch]:
    """Return the start of each worker, with the job file in its place.

    Args:
        launch: Of the job; its work directory holds the job file.
        workers: How many.
    """
    starts = []
    for number in range(workers):
        place = launch.work_dir / FOLDER / str(number)
        place.mkdir(parents=True, exist_ok=True)
        (place / STATUS_NAME).unlink(missing_ok=True)  # how an earlier start ended is not how this one does
        shutil.copyfile(launch.work_dir / JOB_NAME, place / JOB_NAME)
        share = ("--shard", str(number), "--of", str(workers))
        starts.append(replace(launch, work_dir=place, marker=new_marker(), arguments=share))
    return starts


def tidy(work_dir: Path) -> None:
    """Remove what is worth nothing once the workers have ended."""
    for place in places(work_dir):
        (place / HEARTBEAT_NAME).unlink(missing_ok=True)


@contextmanager
def reserve(launcher: Launcher, starts: Sequence[Launch], log: Log) -> Iterator["Workers"]:
    """Take what all workers need, and hold it while the block runs; see `Launcher.reserve`.

    Raises:
        LaunchError: What one of them needs is not there, or did not become free in time.
    """
    with ExitStack() as held:
        yield Workers(tuple(held.enter_context(launcher.reserve(start, log)) for start in starts))


@dataclass
class Workers:
    """Workers as one handle: done when all are, failed as soon as one is.

    Attributes:
        handles: One for each.
        failed: Number and exit code of the one that failed first, as `poll` found.
    """

    handles: tuple[Handle, ...]
    failed: tuple[int, int] | None = None

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the GPUs of all of them."""
        return tuple(name for handle in self.handles for name in handle.devices)

    @property
    def attached(self) -> bool:
        """Whether one of them is only followed."""
        return any(handle.attached for handle in self.handles)

    @property
    def waiting(self) -> bool:
        """Whether all of them wait for their turn."""
        return all(handle.waiting for handle in self.handles)

    def start(self) -> None:
        """Start all of them."""
        for handle in self.handles:
            handle.start()

    def poll(self) -> int | None:
        """Return 0 when all have ended well, the exit code of the first that has not, None otherwise."""
        codes = [handle.poll() for handle in self.handles]
        if self.failed is None:
            self.failed = next(((number, code) for number, code in enumerate(codes) if code), None)
        if self.failed is not None:
            return self.failed[1]
        return None if None in codes else 0

    def stop(self, *, grace_s: float, stack: bool = False, log: Log) -> str:
        """End all of them; see `vpmoe_assets.resources.launcher.Handle`."""
        needed: list[str] = []

        def end(handle: Handle) -> None:
            needed.append(handle.stop(grace_s=grace_s, stack=stack, log=log))

        with ExitStack() as ends:  # all of them, also when an interrupt that came meanwhile takes effect
            for handle in reversed(self.handles):
                ends.callback(end, handle)
        return next((signal for signal in needed if signal != "none"), "none")


@dataclass(frozen=True)
class WorkersWatcher:
    """Follows workers as one job: log and curve of the first go to Dagster, a hang of any is noticed.

    Attributes:
        workers: To be followed.
        watchers: One for each.
        poll_s: Time between two looks, in seconds.
    """

    workers: Workers
    watchers: Sequence[Watcher]
    poll_s: float

    def follow(self, handle: Handle) -> int:
        """Watch until all have ended, or one has failed.

        Returns:
            The exit code.

        Raises:
            StalledError: See `Watcher.follow`.
        """
        while (returncode := handle.poll()) is None:
            self.look()
            for watcher, worker in zip(self.watchers, self.workers.handles, strict=True):
                if worker.waiting:
                    watcher.rest()
                elif worker.poll() is None:
                    watcher.check()
            time.sleep(self.poll_s)
        self.look(all_of_it=True)
        return returncode

    def look(self, *, all_of_it: bool = False) -> None:
        """Pass on what is new of the first."""
        self.watchers[0].look(all_of_it=all_of_it)
