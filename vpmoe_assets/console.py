"""What `dagster asset materialize` and `dg launch --assets` print, readable.

Dagster (1.13.27) puts a hundred characters before each message: date, offset, name of the logger, of the job,
id of the run, process, step, kind of event. A logger of the definitions would not be asked: without a
`loggers` section in the run configuration a run gets Dagster's own. So that one's formatter is replaced, in
the process of such a command alone; the event log, the UI and other processes are as before.
"""

import functools
import logging
import sys
from typing import Any

import click
import dagster._loggers as loggers
from dagster import DagsterEvent, DagsterEventType
from dagster._core.log_manager import get_log_record_metadata, has_log_record_metadata

from vpmoe_assets.selection_guard import typed_selection

_OURS = ("make",)
"""Verbs of `vpmoe` whose log it is."""
_TIME = "%H:%M:%S"
_COLOURS = {logging.WARNING: "33", logging.ERROR: "31", logging.CRITICAL: "31"}


def install() -> None:
    """Make the console of Dagster's commands readable in this process.

    Raises:
        AttributeError: Dagster makes its console elsewhere; this has to be moved.
    """
    made = loggers.create_console_logger
    if hasattr(made, "__wrapped__"):
        return

    @functools.wraps(made)
    def readable(name: str, level: Any) -> logging.Logger:
        logger = made(name, level)
        if _of_a_command():
            for handler in logger.handlers:
                handler.setFormatter(Readable(coloured=_is_terminal(handler)))
        return logger

    loggers.create_console_logger = readable


def _of_a_command() -> bool:
    """Whether a command of a person's runs in this process, and not the UI's or the daemon's."""
    context = click.get_current_context(silent=True)
    return typed_selection() is not None or (context is not None and context.command.name in _OURS)


class Readable(logging.Formatter):
    """The time, the asset, the message; a failure by what it says, with a traceback where nobody foresaw it.

    Args:
        coloured: Colour warnings and errors for a terminal.
    """

    def __init__(self, *, coloured: bool = False) -> None:
        super().__init__(datefmt=_TIME)
        self._coloured = coloured

    def format(self, record: logging.LogRecord) -> str:
        """Return a record as a line, or more where its message has more."""
        text = self._text(record)
        level = f"{record.levelname}: " if record.levelno >= logging.WARNING else ""
        line = f"{self.formatTime(record, self.datefmt)} {level}{text}"
        colour = _COLOURS.get(record.levelno)
        return f"\x1b[{colour}m{line}\x1b[0m" if self._coloured and colour else line

    def _text(self, record: logging.LogRecord) -> str:
        if not has_log_record_metadata(record):
            return record.getMessage()
        metadata = get_log_record_metadata(record)
        message, event = metadata["orig_message"], metadata["dagster_event"]
        step = (metadata["step_key"] or "").rpartition("__")[2]
        if event is not None and event.event_type is DagsterEventType.STEP_FAILURE:
            message = _failure(event)
        elif event is not None and event.event_type is DagsterEventType.RESOURCE_INIT_FAILURE:
            message = f"{message} {_innermost(event)}".strip()
        return message if not step or message.startswith(f"{step}:") else f"{step}: {message}"


def _failure(event: DagsterEvent) -> str:
    data = event.step_failure_data
    if data.user_failure_data is not None and data.user_failure_data.description:
        return data.user_failure_data.description
    return "" if data.error is None else data.error.to_string().strip()


def _innermost(event: DagsterEvent) -> str:
    """Return the message of the error that made a resource fail."""
    error = event.engine_event_data.error
    while error is not None and error.cause is not None:
        error = error.cause
    return "" if error is None else error.message.partition(": ")[2].strip() or error.message.strip()


def _is_terminal(handler: logging.Handler) -> bool:
    stream = getattr(handler, "stream", sys.stderr)
    return bool(getattr(stream, "isatty", lambda: False)())
