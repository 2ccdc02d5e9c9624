"""What is printed of a run: real events of Dagster, executed in this process."""

import io

import dagster as dg
import pytest

from vpmoe_assets.running.progress import Screen
from vpmoe_assets.units import human_duration


@dg.asset(key_prefix="tiny", check_specs=[dg.AssetCheckSpec("rows", asset=["tiny", "synth"])])
def synth(context):
    context.log.info("nobody wants to read this")
    context.log.warning("only two rows")
    for step in (1, 2):
        context.log_event(dg.AssetObservation(context.asset_key, metadata={"step": step, "loss": 2.5 / step}))
    return dg.MaterializeResult(
        tags={"vpmoe/reused": "false", "vpmoe/version": "20260131.1-0a1b2c3d"},
        check_results=[dg.AssetCheckResult(passed=False, check_name="rows", description="2 of 3")],
    )


@dg.asset(key_prefix="tiny")
def bundle(context):
    return dg.MaterializeResult(tags={"vpmoe/reused": "true", "vpmoe/version": "20260131.1-11111111"})


@dg.asset(key_prefix="tiny", deps=[synth])
def kd():
    raise ValueError("row 3 has no answer")


@dg.asset(key_prefix="tiny", deps=[synth])
def told():
    raise dg.Failure("told: synth is damaged")


def followed(stream: io.StringIO) -> Screen:
    instance = dg.DagsterInstance.ephemeral()
    job = dg.Definitions(assets=[synth, bundle, kd, told]).resolve_implicit_global_asset_job_def()
    run_id = "11111111-1111-1111-1111-111111111111"
    screen = Screen(
        stream,
        why={"bundle": "up to date"},
        steps={"synth": 2},
        metrics=lambda asset: {"valid_loss": 1.23456, "rows": 12000, "odd": 1},
        names=frozenset({"synth", "bundle", "kd", "told"}),
    )
    instance.add_event_listener(run_id, screen.follow)
    with screen:
        job.execute_in_process(instance=instance, run_id=run_id, raise_on_error=False)
    return screen


@pytest.fixture(scope="module")
def run():
    stream = io.StringIO()
    return followed(stream), stream.getvalue()


def test_each_asset_has_a_line_with_its_headline_numbers_its_reason_or_its_error(run):
    screen, text = run
    lines = {tuple(line.split()[:2]): line for line in text.splitlines()}
    assert lines["made", "synth"].endswith("s  valid_loss 1.235, rows 12,000")
    assert lines["reused", "bundle"].endswith("s  up to date")
    assert lines["failed", "kd"].endswith("row 3 has no answer")
    assert lines["failed", "told"].endswith("told: synth is damaged")
    assert "Traceback" not in text
    assert [done.how for done in screen.done.values()].count("failed") == 2
    assert not screen.interrupted


def test_warnings_and_failed_checks_are_shown_and_other_messages_are_not(run):
    screen, text = run
    assert "warning only two rows" in text
    assert "warning check rows of synth failed, which" not in text  # it does not block
    assert "check rows of synth failed: 2 of 3" in text
    assert screen.done["synth"].failed_checks == ["rows"]
    assert screen.done["synth"].to_dict()["version"] == "20260131.1-0a1b2c3d"
    assert "nobody" not in text


def test_without_a_terminal_there_is_no_bar(run):
    assert "\x1b" not in run[1]


def test_a_terminal_has_a_bar_that_is_gone_at_the_end(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")

    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    stream = Terminal()
    followed(stream)
    assert "\x1b" in stream.getvalue()
    assert stream.getvalue().rstrip().endswith("\x1b[?25h") or "\x1b[2K" in stream.getvalue()


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (9.96, "10.0 s"), (59.7, "1 min 0 s"), (185, "3 min 5 s"), (7800, "2 h 10 min")],
)
def test_times_for_people(seconds, text):
    assert human_duration(seconds) == text


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), BrokenPipeError(32, "Broken pipe")])
def test_a_terminal_or_a_pipe_that_nobody_reads_any_more_ends_no_run(error):
    class Gone(io.StringIO):
        def write(self, text):
            raise error

        def isatty(self):
            return isinstance(error, BrokenPipeError)

    done = followed(Gone()).done
    assert {name: each.how for name, each in done.items()} == {
        "synth": "made",
        "bundle": "reused",
        "kd": "failed",
        "told": "failed",
    }
