"""A terminal that is closed ends a run as SIGTERM does, instead of killing the process that executes it."""

import signal
import threading
from types import FrameType


def end_with_terminal() -> None:
    """Take SIGHUP for SIGTERM from now on, which Dagster answers by ending the run and its job.

    What ignores it (`nohup`) goes on ignoring it. Signals are handled in the main thread alone; a run in
    another has somebody else's process.
    """
    if (
        threading.current_thread() is threading.main_thread()
        and signal.getsignal(signal.SIGHUP) is signal.SIG_DFL
    ):
        signal.signal(signal.SIGHUP, _terminate)


def _terminate(number: int, frame: FrameType | None) -> None:
    signal.raise_signal(signal.SIGTERM)
