"""Which log records lose credentials: those that somebody may read, of what is secret as they are made."""

import logging

import pytest

from trainer.contract import log_records
from trainer.contract.credentials import REDACTED


@pytest.fixture
def made(monkeypatch):
    """Return the record that a logger makes of a text."""
    before = logging.getLogRecordFactory()
    logging.setLogRecordFactory(logging.LogRecord)
    log_records.install()
    yield lambda logger, text: logger.makeRecord(
        logger.name, logging.DEBUG, "", 0, text, (), None
    ).getMessage()
    logging.setLogRecordFactory(before)


@pytest.fixture
def logger():
    given = logging.getLogger("tests.log_records.own")
    given.propagate = False
    yield given
    given.handlers.clear()
    given.propagate = True


def test_a_record_loses_what_is_secret_when_it_is_made(made, logger, monkeypatch):
    assert made(logger, "it is open-sesame-1") == "it is open-sesame-1"
    monkeypatch.setenv("SOME_TOKEN", "open-sesame-1")
    assert made(logger, "it is open-sesame-1") == f"it is {REDACTED}"
    monkeypatch.setenv("SOME_TOKEN", "open-sesame-2")
    assert made(logger, "open-sesame-1, open-sesame-2") == f"open-sesame-1, {REDACTED}"


def test_a_record_that_no_handler_sees_is_not_looked_through(made, logger, monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "open-sesame-3")
    logger.handlers[:] = [logging.NullHandler()]  # pytest adds its own to a logger that does not propagate
    assert made(logger, "open-sesame-3") == "open-sesame-3"
    logger.propagate = True
    assert made(logger, "open-sesame-3") == REDACTED
    logger.propagate = False
    logger.addHandler(logging.StreamHandler())
    assert made(logger, "open-sesame-3") == REDACTED
    logger.handlers.clear()
    assert made(logger, "open-sesame-3") == REDACTED, "standard error gets warnings that no handler takes"
    assert made(logging.Logger("of no tree"), "open-sesame-3") == REDACTED
