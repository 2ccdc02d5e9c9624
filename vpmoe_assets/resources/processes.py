"""The processes of one trainer job: found and stopped.

A job is a tree that no process group holds together: torchrun puts every rank into a session of its own. What
all of them share is a random marker in their environment, inherited over fork and exec. A process is
signalled only when it carries the marker of the job that is being ended, so a process id that was given to
somebody else is never touched.
"""

import contextlib
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import FrameType
from typing import Any, Self

import psutil

MARKER_ENV = "VPMOE_JOB"
_POLL_S = 0.5
_DEBOUNCE_S = 5.0
_HELPERS_S = 5.0

Log = Callable[[str], None]


class ProcessesRemainError(RuntimeError):
    """Processes are still there after SIGKILL (uninterruptible sleep in a driver or a file system)."""


def new_marker() -> str:
    """Return a marker for one start of one job."""
    return uuid.uuid4().hex


def members(marker: str) -> list[psutil.Process]:
    """All living processes that carry the marker, except this one. Zombies hold nothing and do not count."""
    found = []
    for process in psutil.process_iter():
        # A process of another user, or one that ended just now, is none of ours.
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(MARKER_ENV) == marker and process.pid != os.getpid():
                found.append(process)
    return found


def roots(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Those whose parent is not among them: the trainer, or torchrun, or ranks that torchrun left behind."""
    pids = {process.pid for process in processes}
    tops = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            if process.ppid() not in pids:
                tops.append(process)
    return tops


def _signal(processes: list[psutil.Process], number: signal.Signals) -> None:
    for process in processes:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(number)  # psutil compares the start time before it sends


class Interrupts:
    """Notes SIGINT and SIGTERM while a job is being ended, so that no exception cuts the work short.

    An interrupt during the wait for a checkpoint means "hurry", unless it comes with the first one: one
    Ctrl-C often arrives twice, from the terminal and from a parent that passes it on. Afterwards the former
    handlers are back and get the signal, so none is lost. Python runs handlers in the main thread; in another
    thread there is nothing to hold back.
    """

    def __init__(self) -> None:
        self._received: list[tuple[int, float]] = []
        self._former: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._former[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._former.items():
            signal.signal(number, handler)
        if self._received:
            signal.raise_signal(self._received[0][0])

    def _note(self, number: int, frame: FrameType | None) -> None:
        self._received.append((number, time.monotonic()))

    def later_than(self, moment: float) -> bool:
        """Whether one came after `moment`, of the monotonic clock."""
        return any(when > moment for _, when in self._received)


@dataclass
class _Ending:
    """One job on its way out."""

    marker: str
    command: tuple[str, ...]
    interrupts: Interrupts

    def gone(self, seconds: float) -> bool:
        """Wait until nothing is left: `seconds` at most, and only briefly once helpers alone are left."""
        begun = time.monotonic()
        deadline, alone = begun + seconds, False
        while living := members(self.marker):
            if not alone and not any(self._essential(process) for process in living):
                deadline, alone = min(deadline, time.monotonic() + _HELPERS_S), True
            now = time.monotonic()
            if now >= deadline or self.interrupts.later_than(begun + _DEBOUNCE_S):
                return False
            time.sleep(min(_POLL_S, deadline - now))
        return True

    def _essential(self, process: psutil.Process) -> bool:
        """Whether it is a rank, or torchrun, whose command line ends with the rank's."""
        try:
            line = process.cmdline()
        except psutil.Error:
            return False
        return not self.command or tuple(line[-len(self.command) :]) == self.command


def end_job(
    marker: str,
    *,
    command: Sequence[str] = (),
    grace_s: float,
    terminate_s: float = 5.0,
    interrupt: bool = True,
    stack: bool = False,
    log: Log = lambda message: None,
) -> str:
    """End all processes of a job; returns only when none is left.

    SIGINT goes to the roots alone: the trainer then writes a checkpoint and exits, torchrun passes the signal
    on. Helpers of a rank (data loaders, the W&B service) are not signalled, because the rank still needs them
    for that. What is left after `grace_s` gets SIGTERM, after `terminate_s` more SIGKILL, whatever it is. An
    interrupt (a second Ctrl-C) that arrives meanwhile moves on to the next signal instead of leaving
    processes behind; it takes effect when the job has ended.

    Args:
        marker: The job's marker.
        command: Command line of a rank. When no process with it is left, the rest are helpers, and for them
            `grace_s` is cut to a few seconds; empty takes every process for a rank.
        grace_s: Time to write a checkpoint and exit, in seconds.
        terminate_s: Time between SIGTERM and SIGKILL, in seconds.
        interrupt: Whether to send SIGINT; False where the job is known to be exiting already.
        stack: Sends SIGABRT before SIGKILL, on which Python's faulthandler prints the stack of every thread.
        log: Told what is done when it is more than a quick exit.

    Returns:
        The last signal that was needed: "none", "SIGINT", "SIGTERM" or "SIGKILL".

    Raises:
        ProcessesRemainError: Something survived SIGKILL; the message names it.
    """
    with Interrupts() as interrupts:
        ending = _Ending(marker, tuple(command), interrupts)
        living = members(marker)
        if not living:
            return "none"
        if interrupt:
            _signal(roots(living), signal.SIGINT)
            log(f"Sent SIGINT to the trainer; it has {grace_s:g} s to write a checkpoint and exit.")
        if ending.gone(grace_s):
            return "SIGINT" if interrupt else "none"
        log(f"Still running, now SIGTERM: {_described(members(marker))}")
        _signal(members(marker), signal.SIGTERM)
        if ending.gone(terminate_s):
            return "SIGTERM"
        if stack:
            _signal(members(marker), signal.SIGABRT)
            ending.gone(2.0)
        log(f"Still running, now SIGKILL: {_described(members(marker))}")
        end = time.monotonic() + 30.0
        while living := members(marker):  # again: a process may start another while it is being killed
            _signal(living, signal.SIGKILL)
            if not ending.gone(1.0) and time.monotonic() > end:
                raise ProcessesRemainError(
                    f"Still there after SIGKILL: {_described(living)}. They are stuck in the kernel (GPU "
                    "driver, network file system); see `cat /proc/PID/stack`. The machine may need a restart."
                )
        return "SIGKILL"


def _described(processes: list[psutil.Process]) -> str:
    parts = []
    for process in processes:
        with contextlib.suppress(psutil.Error):
            parts.append(f"{process.pid} ({' '.join(process.cmdline())[:80]})")
    return ", ".join(parts) or "nothing"
