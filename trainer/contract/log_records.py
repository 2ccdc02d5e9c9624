"""What a process logs, by whatever library, says no credential: event logs and log files keep it for good."""

import logging
import traceback
from typing import Any

from trainer.contract.credentials import without_credentials


def install() -> None:
    """Remove credentials from every log record of this process before a handler sees it.

    HTTP clients log addresses, hubs forward to signed ones, and a traceback repeats what an error says; and a
    message of Dagster's is a log record before it is an event.
    """
    made = logging.getLogRecordFactory()
    if hasattr(made, "__wrapped__"):
        return

    def safe(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = made(*args, **kwargs)
        return _redacted(record) if _heard(record.name) else record

    safe.__wrapped__ = made  # type: ignore[attr-defined]
    logging.setLogRecordFactory(safe)


def _heard(name: str) -> bool:
    """Say whether a handler may see what a logger says.

    Torch tells of every tensor that it saves to a logger with no handler but a `NullHandler`.
    """
    logger: Any = logging.root.manager.loggerDict.get(name)
    while isinstance(logger, logging.Logger):
        if not all(isinstance(handler, logging.NullHandler) for handler in logger.handlers):
            return True
        if not logger.propagate:
            return not logger.handlers  # without any, warnings go to standard error
        logger = logger.parent
    return True


def _redacted(record: logging.LogRecord) -> logging.LogRecord:
    try:
        said = record.getMessage()
    except Exception:  # its handler says that the arguments do not fit, as ever
        return record
    if (shown := without_credentials(said)) != said:
        record.msg, record.args = shown, ()
    if isinstance(record.exc_info, tuple) and record.exc_info[1] is not None:
        trace = "".join(traceback.format_exception(*record.exc_info)).rstrip("\n")
        if (shown := without_credentials(trace)) != trace:
            record.exc_info, record.exc_text = None, shown
    return record
