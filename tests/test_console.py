"""What a command of Dagster's prints, and that nothing else of a process is changed."""

import logging

import click
import dagster as dg
import pytest
from dagster import _loggers as loggers

from vpmoe_assets import console


@dg.asset(key_prefix="tiny")
def synth(context):
    context.log.info("synth: reused 20260131.1-0a1b2c3d")
    context.log.warning("only two rows")


@dg.asset(key_prefix="tiny", deps=[synth])
def told():
    raise dg.Failure("told: its input is damaged")


@dg.asset(key_prefix="tiny", deps=[synth])
def broken():
    raise ValueError("row 3 has no answer")


@pytest.fixture
def printed(monkeypatch, capsys):
    """Run the assets as a command with these parameters would, and return what it prints."""
    monkeypatch.setattr(
        loggers,
        "create_console_logger",
        getattr(loggers.create_console_logger, "__wrapped__", loggers.create_console_logger),
    )
    console.install()
    console.install()

    def run(assets=(synth, told, broken), store=None, **parameters: str) -> str:
        with click.Context(click.Command("materialize")) as context:
            context.params = parameters
            logger = loggers.create_console_logger("dagster", "INFO")

        @dg.logger
        def ours(_) -> logging.Logger:
            return logger

        resources = {} if store is None else {"store": store}
        definitions = dg.Definitions(assets=assets, loggers={"console": ours}, resources=resources)
        job = definitions.resolve_implicit_global_asset_job_def()
        job.execute_in_process(run_config={"loggers": {"console": {}}}, raise_on_error=False)
        return capsys.readouterr().err

    return run


def test_a_message_has_the_time_and_the_asset_before_it_and_no_more(printed):
    lines = printed(select="*").splitlines()
    assert next(line for line in lines if "reused" in line)[8:] == " synth: reused 20260131.1-0a1b2c3d"
    assert next(line for line in lines if "two rows" in line)[8:] == " WARNING: synth: only two rows"
    (failed,) = [line for line in lines if "damaged" in line]
    assert failed[8:] == " ERROR: told: its input is damaged"
    assert "ValueError: row 3 has no answer" in "\n".join(lines)
    assert "Traceback" in "\n".join(lines) or "Stack Trace" in "\n".join(lines)
    assert "\x1b" not in "".join(lines)


def test_a_resource_that_fails_says_why(printed, monkeypatch):
    class Full(dg.ConfigurableResource):
        def setup_for_execution(self, context):
            raise dg.Failure("No space left on device: /store; make room there")

    @dg.asset(key_prefix="tiny")
    def needy(store: Full):
        pass

    (line,) = [
        line for line in printed([needy], store=Full(), select="*").splitlines() if "Initialization" in line
    ]
    assert line.endswith("make room there")


def test_other_processes_print_as_dagster_does(printed):
    assert " - dagster - INFO - " in printed(port="3000")


def test_warnings_and_errors_have_a_colour_on_a_terminal():
    record = logging.LogRecord("x", logging.WARNING, "", 0, "careful", None, None)
    assert console.Readable(coloured=True).format(record).startswith("\x1b[33m")
    assert "\x1b" not in console.Readable().format(record)


def test_a_dagster_that_makes_its_console_elsewhere_fails_as_the_code_location_loads(monkeypatch):
    monkeypatch.delattr(loggers, "create_console_logger")
    with pytest.raises(AttributeError, match="create_console_logger"):
        console.install()
