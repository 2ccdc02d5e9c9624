"""A closed terminal ends a run as SIGTERM does."""

import signal
from collections.abc import Iterator
from types import FrameType

import pytest

from vpmoe_assets.resources.hangup import end_with_terminal


@pytest.fixture
def received() -> Iterator[list[int]]:
    """Signals that arrive as SIGTERM."""
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)

    before = {number: signal.getsignal(number) for number in (signal.SIGHUP, signal.SIGTERM)}
    signal.signal(signal.SIGTERM, note)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield found
    for number, handler in before.items():
        signal.signal(number, handler)


def test_it_is_taken_for_sigterm(received: list[int]) -> None:
    end_with_terminal()
    end_with_terminal()
    signal.raise_signal(signal.SIGHUP)
    assert received == [signal.SIGTERM]


def test_what_ignores_it_goes_on_ignoring_it(received: list[int]) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    end_with_terminal()
    signal.raise_signal(signal.SIGHUP)
    assert received == []
