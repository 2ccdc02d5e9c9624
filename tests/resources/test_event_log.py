"""The event log that a run's process holds open."""

import sqlite3
from pathlib import Path

import dagster as dg
import pytest

from vpmoe_assets.resources import event_log
from vpmoe_assets.resources.event_log import hold_open


@pytest.fixture
def instance(tmp_path: Path):
    with dg.DagsterInstance.local_temp(str(tmp_path)) as made:
        yield made
    for connection in event_log._held.values():
        connection.close()
    event_log._held.clear()


def logs(instance: dg.DagsterInstance) -> dict[str, bool]:
    """Whether each database of the event log has a write-ahead log that no connection has carried over."""
    folder = Path(instance.event_log_storage._base_dir)
    return {path.stem: path.with_name(f"{path.name}-wal").exists() for path in folder.glob("*.db")}


def run_of(instance: dg.DagsterInstance) -> str:
    @dg.op
    def nothing() -> None: ...

    @dg.job
    def empty() -> None:
        nothing()

    return empty.execute_in_process(instance=instance).run_id


def test_a_log_that_nobody_holds_is_carried_over_each_time(instance):
    run = run_of(instance)
    assert logs(instance) == {run: False, "index": False}


def test_the_logs_of_the_run_and_of_all_runs_stay_open_and_those_of_an_earlier_run_are_let_go(instance):
    first, second = run_of(instance), run_of(instance)
    hold_open(instance, first)
    instance.report_engine_event("told", run_id=first, job_name="empty")
    assert logs(instance) == {first: True, second: False, "index": True}
    told = [record.message for record in instance.all_logs(first)]
    assert "told" in told

    hold_open(instance, second)
    hold_open(instance, second)
    instance.report_engine_event("told", run_id=second, job_name="empty")
    assert logs(instance) == {first: False, second: True, "index": True}


def test_what_was_written_is_there_for_another_program_and_after_a_kill(instance):
    run = run_of(instance)
    hold_open(instance, run)
    instance.report_engine_event("told", run_id=run, job_name="empty")
    other = sqlite3.connect(instance.event_log_storage.path_for_shard(run))
    (found,) = other.execute("SELECT count(*) FROM event_logs WHERE event LIKE '%told%'").fetchone()
    other.close()
    assert found == 1


def test_an_instance_in_memory_has_nothing_to_hold():
    with dg.DagsterInstance.ephemeral() as instance:
        hold_open(instance, "a-run")
    assert event_log._held == {}


def test_a_log_that_cannot_be_opened_ends_nothing(instance):
    hold_open(instance, "no-such-run")
    assert all(path.endswith("index.db") for path in event_log._held)
