"""A polite stop: the first SIGINT or SIGTERM asks, the loop answers at its next step boundary."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """Set by a signal, read by the training loop.

    The handler does nothing but note the signal. Work in progress (a step, a save) always ends the normal
    way, so a second signal in the middle of a save changes nothing; whoever cannot wait sends SIGKILL,
    which a save survives by being renamed into place only when it is complete.

    Attributes:
        received: Name of the first signal, or None.
    """

    def __init__(self) -> None:
        self.received: str | None = None
        self.count = 0

    def __bool__(self) -> bool:
        return self.received is not None

    def request(self, reason: str) -> None:
        """Ask for a stop, as a signal would."""
        self.count += 1
        self.received = self.received or reason

    def _handle(self, number: int, frame: FrameType | None) -> None:
        del frame
        self.request(signal.Signals(number).name)

    @contextmanager
    def listening(self) -> Iterator["StopRequest"]:
        """Catch SIGINT and SIGTERM while the block runs and put the former handlers back afterwards.

        Must be entered in the main thread, as Python requires of signal handlers.
        """
        before = {number: signal.signal(number, self._handle) for number in SIGNALS}
        try:
            yield self
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
