"""The work directory of one job: what a restart resumes from and what a watcher reads while the job runs.

`trainer.contract.status` names its files. The directory outlives a crash. Every file here is either appended
to or replaced by a rename, so a reader never sees half of one.
"""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_text
from trainer.contract.status import (
    CHECKPOINTS_NAME,
    FAILED,
    HEARTBEAT_NAME,
    LOG_NAME,
    METRICS_NAME,
    STATUS_NAME,
    status_line,
)

HEARTBEAT_SECONDS = 5.0
"""Half of the ten seconds that the contract with the orchestrator promises."""

LOGGER = logging.getLogger("trainer")
_FORM = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%Y-%m-%dT%H:%M:%S")


class WorkDir:
    """The files of a job that are not checkpoints or metrics.

    Only rank 0 writes `STATUS` and `heartbeat`; on other ranks the same calls do nothing, so callers need
    not ask.

    Attributes:
        path: The directory itself.
        checkpoints: Where resume checkpoints go.
        metrics: The metrics file.
    """

    def __init__(self, path: Path, *, rank: int = 0) -> None:
        self.path = path
        self.rank = rank
        self.checkpoints = path / CHECKPOINTS_NAME
        self.metrics = path / METRICS_NAME
        path.mkdir(parents=True, exist_ok=True)
        self._beat: dict[str, Any] = {"phase": "start", "iteration": 0}
        self._beat_lock = threading.Lock()

    @property
    def leads(self) -> bool:
        """Whether this process is the one that writes the shared files."""
        return self.rank == 0

    def status(self, state: str) -> None:
        """Replace `STATUS`."""
        if self.leads:
            replace_text(self.path / STATUS_NAME, status_line(state))

    def fail(self, reason: str) -> None:
        """Put `failed: <reason>` into `STATUS`, from any rank, unless another rank was first.

        The first failure is the cause; what the other ranks meet afterwards is a broken connection.
        """
        if not self.read_status().startswith(FAILED):
            replace_text(self.path / STATUS_NAME, status_line(FAILED, reason))

    def read_status(self) -> str:
        """Return the present `STATUS`, or an empty string where none was written yet."""
        try:
            return (self.path / STATUS_NAME).read_text(encoding="utf-8").strip()
        except FileNotFoundError:
            return ""

    def at(self, phase: str, iteration: int) -> None:
        """Note what the job is doing; the next heartbeat says so, with the time since when."""
        with self._beat_lock:
            self._beat = {"phase": phase, "iteration": iteration, "since_unix_s": round(time.time(), 3)}

    def beat(self) -> None:
        """Write one heartbeat; an error (a full disk) is logged, it must not end the job."""
        if not self.leads:
            return
        with self._beat_lock:
            content: Mapping[str, Any] = {**self._beat, "unix_s": round(time.time(), 3), "pid": os.getpid()}
        path = self.path / HEARTBEAT_NAME
        try:
            replace_text(path, json.dumps(content) + "\n", durable=False)
        except OSError as error:
            LOGGER.warning("heartbeat not written: %s", error)

    @contextmanager
    def heartbeat(self, seconds: float = HEARTBEAT_SECONDS) -> Iterator[None]:
        """Beat from a thread of its own while the block runs.

        A thread, because a save or the building of a large model keeps the main thread away for longer than
        a watcher waits. What the main thread is at, and since when, stands in the file: a watcher that
        wants progress and not only life reads `since_unix_s`.

        Args:
            seconds: Time between two beats.
        """
        ended = threading.Event()

        def run() -> None:
            while not ended.wait(seconds):
                self.beat()

        self.beat()
        thread = threading.Thread(target=run, name="heartbeat", daemon=True)
        thread.start()
        try:
            yield
        finally:
            ended.set()
            thread.join()
            self.beat()

    @contextmanager
    def logging(self) -> Iterator[logging.Logger]:
        """Send the log to `log.txt` (rank 0, to standard error too) or `log.rank_NNNNN.txt`."""
        name = LOG_NAME if self.leads else f"log.rank_{self.rank:05d}.txt"
        handlers: list[logging.Handler] = [logging.FileHandler(self.path / name, encoding="utf-8")]
        if self.leads:
            handlers.append(logging.StreamHandler(sys.stderr))
        for handler in handlers:
            handler.setFormatter(_FORM)
            LOGGER.addHandler(handler)
        LOGGER.setLevel(logging.INFO)
        propagate, LOGGER.propagate = LOGGER.propagate, False
        try:
            yield LOGGER
        finally:
            LOGGER.propagate = propagate
            for handler in handlers:
                LOGGER.removeHandler(handler)
                handler.close()


@contextmanager
def logged_to(path: Path) -> Iterator[None]:
    """Send what the log is told in the block to a file of its own too, which is appended to."""
    handler = logging.FileHandler(path, encoding="utf-8")
    handler.setFormatter(_FORM)
    LOGGER.addHandler(handler)
    try:
        yield
    finally:
        LOGGER.removeHandler(handler)
        handler.close()
