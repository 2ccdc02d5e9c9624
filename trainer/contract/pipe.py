"""How a command ends whose reader leaves early, as in `vpmoe ls | head -1`: without a word."""

import os
import sys
from collections.abc import Callable

CLOSED_PIPE = 141
"""128 + SIGPIPE: the exit code of a program that the shell saw die of a closed pipe."""


def quiet_when_unread(command: Callable[[], int]) -> int:
    """Run a command that prints; where nobody reads on, end as other programs end.

    Not by SIGPIPE itself: that would also kill a process over any other pipe or socket that is closed, with
    work half done.

    Args:
        command: Returns the exit code, or raises `SystemExit`.

    Returns:
        The command's exit code, or `CLOSED_PIPE`.
    """
    try:
        try:
            return command()
        finally:
            sys.stdout.flush()
    except BrokenPipeError:
        return leave_unread()


def leave_unread() -> int:
    """Send what is still to be printed nowhere (the interpreter flushes once more when it ends).

    Returns:
        `CLOSED_PIPE`.
    """
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)
    return CLOSED_PIPE
