"""Several processes of one job that share its work, each started and ended as a job of its own.

Each has a directory of its own below the job's work directory, with the job file that it was started with,
what it printed, and the record by which it is found after a crash.
"""

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.contract.status import HEARTBEAT_NAME, JOB_NAME
from vpmoe_assets.resources.launcher import Handle, Launch, Launcher
from vpmoe_assets.resources.processes import Log, new_marker

FOLDER = "workers"


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
        shutil.copyfile(launch.work_dir / JOB_NAME, place / JOB_NAME)
        share = ("--shard", str(number), "--of", str(workers))
        starts.append(replace(launch, work_dir=place, marker=new_marker(), arguments=share))
    return starts


def places(work_dir: Path) -> list[Path]:
    """Return the directories of the workers that a job has had, in order."""
    return sorted(path for path in (work_dir / FOLDER).glob("*") if path.is_dir())


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


@dataclass(frozen=True)
class Workers:
    """Workers as one handle: done when all are, failed as soon as one is."""

    handles: tuple[Handle, ...]

    @property
    def devices(self) -> tuple[str, ...]:
        """Names of the GPUs of all of them."""
        return tuple(name for handle in self.handles for name in handle.devices)

    def start(self) -> None:
        """Start all of them."""
        for handle in self.handles:
            handle.start()

    def poll(self) -> int | None:
        """Return 0 when all have ended well, the exit code of one that has not, None otherwise."""
        codes = [handle.poll() for handle in self.handles]
        if any(codes):
            return self.failed()[1]
        return None if None in codes else 0

    def failed(self) -> tuple[int, int]:
        """Return number and exit code of the first worker that has failed.

        Raises:
            StopIteration: None has.
        """
        codes = ((number, handle.poll()) for number, handle in enumerate(self.handles))
        return next((number, code) for number, code in codes if code)

    def stop(self, *, grace_s: float, stack: bool = False, log: Log) -> str:
        """End all of them; see `vpmoe_assets.resources.launcher.Handle`."""
        needed: list[str] = []

        def end(handle: Handle) -> None:
            needed.append(handle.stop(grace_s=grace_s, stack=stack, log=log))

        with ExitStack() as ends:  # all of them, also when an interrupt that came meanwhile takes effect
            for handle in reversed(self.handles):
                ends.callback(end, handle)
        return next((signal for signal in needed if signal != "none"), "none")
