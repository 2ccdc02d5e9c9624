"""What is done after a crash of an orchestrator, with real processes and real Dagster instances."""

import json
import os
import time
import uuid
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import dagster as dg
import pytest

from tests.resources.marked import DEAF, POLITE, Start, dead_orchestrator, left_behind
from vpmoe_assets.resources import reaping
from vpmoe_assets.resources.instances import InstanceIdentity, InstanceUnavailableError
from vpmoe_assets.resources.process_record import RECORD_NAME, Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import ProcessesRemainError
from vpmoe_assets.resources.reaping import (
    HostNotGoneError,
    close_dead_runs,
    end_dead_jobs,
    give_up_host,
    reap,
    settle,
)
from vpmoe_assets.resources.run_record import RunRecord, path_of

JOB = Path(".work", "smoke", "vpmoe_stage1-01234567")


def on_host(host: str, record: ProcessRecord) -> ProcessRecord:
    return replace(record, orchestrator=replace(record.orchestrator, host=host))


def test_reap_ends_what_a_dead_orchestrator_left(start: Start, marker: str, tmp_path: Path) -> None:
    process = start(POLITE.format(seconds=0))
    work = tmp_path / ".work" / "smoke" / "vpmoe_stage1-01234567"
    left_behind(marker, work)
    (found,) = reap(tmp_path, grace_s=10.0)
    assert (found.work_dir, found.asset, found.processes, found.needed) == (work, "vpmoe_stage1", 1, "SIGINT")
    assert process.wait() == 0
    assert not (work / RECORD_NAME).exists()
    assert reap(tmp_path) == []


def test_a_job_that_was_told_of_the_death_gets_no_second_signal(
    start: Start, marker: str, tmp_path: Path
) -> None:
    start("import time; print('ready', flush=True); time.sleep(1.5)")
    left_behind(marker, tmp_path / ".work" / "smoke" / "x-01234567", told=True)
    (found,) = reap(tmp_path, grace_s=20.0)
    assert (found.processes, found.needed) == (1, "none")


def test_a_recycled_process_id_is_not_killed(start: Start, marker: str, tmp_path: Path) -> None:
    innocent = start(DEAF, mark="innocent")
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    record = left_behind(marker, work)
    replace(record, pid=innocent.pid).write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert (found.processes, found.needed) == (0, "none")
    assert innocent.poll() is None


def test_an_orchestrator_is_known_by_its_start_time_too() -> None:
    this = Orchestrator.this()
    assert not this.dead
    assert replace(this, started=this.started - 100.0).dead


def test_a_job_of_a_living_orchestrator_is_left_alone(start: Start, marker: str, tmp_path: Path) -> None:
    process = start(DEAF)
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    replace(left_behind(marker, work), orchestrator=Orchestrator.this()).write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert found.note == f"is being run by process {os.getpid()}"
    assert process.poll() is None
    assert (work / RECORD_NAME).exists()


def test_a_job_of_another_machine_is_left_alone(marker: str, tmp_path: Path) -> None:
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    on_host("elsewhere", left_behind(marker, work)).write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert found.note.startswith("runs or ran on host elsewhere: reap it there")
    assert "vpmoe reap --host-gone elsewhere" in found.note
    assert (work / RECORD_NAME).exists()


def test_whoever_holds_the_directory_takes_a_machine_that_was_silent_for_long_for_dead(
    marker: str, tmp_path: Path
) -> None:
    tmp_path = tmp_path / "work"
    on_host("elsewhere", left_behind(marker, tmp_path)).write(tmp_path)
    beat = tmp_path / "heartbeat"
    beat.touch()
    for path in (beat, tmp_path / RECORD_NAME):
        os.utime(path, (time.time() - 7200.0,) * 2)
    said: list[str] = []
    for patience in (None, 9000.0):
        found = settle(tmp_path, grace_s=0.0, silence_s=patience)
        assert found is not None
        assert "runs or ran on host elsewhere" in found.note
    done = settle(tmp_path, grace_s=0.0, silence_s=3600.0, log=said.append)
    assert done is not None
    assert done.note == ""
    assert "on host elsewhere has been silent for 720" in said[0]
    assert settle(tmp_path, grace_s=0.0) is None


def test_after_a_reboot_the_record_is_stale_even_if_the_process_id_is_in_use(
    marker: str, tmp_path: Path
) -> None:
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    earlier = replace(Orchestrator.this(), boot="an earlier one")
    replace(left_behind(marker, work), orchestrator=earlier).write(work)
    (found,) = reap(tmp_path, grace_s=0.0)
    assert (found.note, found.processes) == ("", 0)
    assert not (work / RECORD_NAME).exists()


def test_checkpoints_are_not_searched_for_records(marker: str, tmp_path: Path) -> None:
    left_behind(marker, tmp_path / ".work" / "smoke" / "x-01234567" / "checkpoints" / "iter_0000001")
    assert reap(tmp_path) == []


def test_a_foreign_record_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / RECORD_NAME).write_text(json.dumps({"schema": "something else"}))
    with pytest.raises(ValueError, match=r"\.process\.json is not a vpmoe\.process/2 record"):
        settle(tmp_path, grace_s=0.0)


def test_the_next_start_ends_what_a_dead_orchestrator_left_and_says_so(
    start: Start, marker: str, tmp_path: Path
) -> None:
    process = start(POLITE.format(seconds=0))
    mine, other = tmp_path / ".work" / "smoke" / "x-01234567", tmp_path / ".work" / "smoke" / "y-01234567"
    left_behind(marker, mine)
    replace(left_behind("another", other), orchestrator=Orchestrator.this()).write(other)
    said: list[str] = []
    end_dead_jobs(tmp_path, grace_s=10.0, log=said.append)
    assert process.wait() == 0
    assert said[0].startswith(
        "The process that was making vpmoe_stage1 was killed, and 1 of its job are still"
    )
    assert said[-1] == "The job of vpmoe_stage1 has ended (last signal needed: SIGINT)."
    assert not (mine / RECORD_NAME).exists()
    assert (other / RECORD_NAME).exists()
    end_dead_jobs(tmp_path, log=pytest.fail)


def test_a_job_that_was_started_meanwhile_keeps_its_record(marker: str, tmp_path: Path) -> None:
    work = tmp_path / ".work" / "smoke" / "x-01234567"
    left_behind(marker, work)
    ProcessRecord.remove(work, "of an earlier one")
    assert (work / RECORD_NAME).exists()
    ProcessRecord.remove(work, marker)
    assert not (work / RECORD_NAME).exists()


class Home:
    """A Dagster instance with one pool, and runs that hold its slot."""

    def __init__(self, directory: Path, store: Path) -> None:
        directory.mkdir()
        self.instance = dg.DagsterInstance.local_temp(str(directory))
        self.instance.event_log_storage.set_concurrency_slots("gpu", 1)
        self.store = store

    def run(self, orchestrator: Orchestrator) -> str:
        """A run that a process executes, in a step that holds the slot."""

        @dg.job
        def nothing() -> None:
            pass

        run_id = self.instance.create_run_for_job(nothing, status=dg.DagsterRunStatus.STARTED).run_id
        self.instance.event_log_storage.claim_concurrency_slot("gpu", run_id, "vpmoe_stage1")
        identity = InstanceIdentity.of(self.instance)
        assert identity is not None
        RunRecord(run_id, orchestrator, identity).write(path_of(self.store, run_id))
        return run_id

    def status(self, run_id: str) -> dg.DagsterRunStatus:
        run = self.instance.get_run_by_id(run_id)
        assert run is not None
        return run.status

    @property
    def held(self) -> int:
        return self.instance.event_log_storage.get_concurrency_info("gpu").active_slot_count


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Home]:
    """An instance that the environment says nothing of."""
    monkeypatch.delenv("DAGSTER_HOME", raising=False)
    home = Home(tmp_path / "home", tmp_path / "store")
    with home.instance:
        yield home


def test_the_run_of_a_dead_job_is_closed_in_its_own_instance_and_its_slot_is_free(
    home: Home, marker: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "another"))
    run_id = home.run(dead_orchestrator())
    assert home.held == 1
    left_behind(marker, home.store / JOB, run_id=run_id)
    (found,) = reap(home.store, grace_s=0.0)
    assert (found.asset, found.dagster_run_id, found.run_failed) == ("vpmoe_stage1", run_id, True)
    assert home.status(run_id) == dg.DagsterRunStatus.FAILURE
    assert home.held == 0
    assert not (tmp_path / "another").exists()
    assert reap(home.store) == []


def test_a_run_that_died_outside_any_job_is_closed_too(home: Home) -> None:
    run_id = home.run(dead_orchestrator())
    (found,) = reap(home.store)
    assert (found.asset, found.dagster_run_id, found.run_failed, found.note) == (None, run_id, True, "")
    assert (home.status(run_id), home.held) == (dg.DagsterRunStatus.FAILURE, 0)
    assert reap(home.store) == []


def test_the_run_of_a_living_process_is_left_alone(home: Home) -> None:
    run_id = home.run(Orchestrator.this())
    assert reap(home.store) == []
    close_dead_runs(home.store, pytest.fail)
    assert (home.status(run_id), home.held) == (dg.DagsterRunStatus.STARTED, 1)


def test_a_run_that_ended_before_its_process_was_killed_is_forgotten_without_a_word(home: Home) -> None:
    run_id = home.run(dead_orchestrator())
    home.instance.report_run_failed(home.instance.get_run_by_id(run_id), "by itself")
    assert reap(home.store) == []
    assert not path_of(home.store, run_id).exists()


def test_a_run_that_dagster_has_forgotten_is_no_obstacle(home: Home) -> None:
    run_id = home.run(dead_orchestrator())
    home.instance.delete_run(run_id)
    assert reap(home.store) == []
    assert not path_of(home.store, run_id).exists()


def test_an_instance_that_cannot_be_written_to_ends_no_start(
    home: Home, monkeypatch: pytest.MonkeyPatch
) -> None:
    def read_only(*arguments: object) -> None:
        raise RuntimeError("attempt to write a readonly database")

    run_id = home.run(dead_orchestrator())
    monkeypatch.setattr(dg.DagsterInstance, "report_run_failed", read_only)
    said: list[str] = []
    close_dead_runs(home.store, said.append)
    (message,) = said
    assert f"run {run_id} could not be closed" in message
    assert "readonly database" in message
    assert path_of(home.store, run_id).exists()


@pytest.mark.parametrize("trouble", ["gone", "broken"])
def test_the_evidence_stays_until_the_run_is_closed(
    home: Home, marker: str, tmp_path: Path, trouble: str
) -> None:
    run_id = home.run(dead_orchestrator())
    left_behind(marker, home.store / JOB, run_id=run_id)
    kept = (tmp_path / "home").rename(tmp_path / "away")
    if trouble == "broken":
        (tmp_path / "home").mkdir()
        (tmp_path / "home" / "history").write_text("no directory")
    for _ in range(2):
        found = reap(home.store, grace_s=0.0)[0]
        assert not found.run_failed
        assert f"run {run_id} could not be closed" in found.note
        assert str(tmp_path / "home") in found.note
        assert f"remove {path_of(home.store, run_id)}" in found.note
    assert not (home.store / JOB / RECORD_NAME).exists()  # the processes are gone: the work directory is free
    if trouble == "broken":
        (tmp_path / "home" / "history").unlink()
        (tmp_path / "home").rmdir()
    kept.rename(tmp_path / "home")
    (found,) = reap(home.store)
    assert found.run_failed
    assert home.held == 0


def test_a_run_stays_open_while_a_process_of_its_job_cannot_be_ended(
    home: Home, marker: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stuck(*arguments: object, **options: object) -> str:
        raise ProcessesRemainError("Still there after SIGKILL: 7 (python)")

    run_id = home.run(dead_orchestrator())
    left_behind(marker, home.store / JOB, run_id=run_id)
    monkeypatch.setattr(reaping, "end_job", stuck)
    (found,) = reap(home.store, grace_s=0.0)
    assert "Still there" in found.note
    assert (home.status(run_id), home.held) == (dg.DagsterRunStatus.STARTED, 1)
    assert (home.store / JOB / RECORD_NAME).exists()


def test_one_unreadable_record_does_not_keep_the_others_from_being_reaped(home: Home, marker: str) -> None:
    broken = home.store / ".work" / "smoke" / "a-01234567"
    broken.mkdir(parents=True)
    (broken / RECORD_NAME).write_text("{}")
    path_of(home.store, "x").parent.mkdir(parents=True)
    path_of(home.store, "a-broken-one").write_text('{"schema": "vpmoe.run/1"}')
    run_id = home.run(dead_orchestrator())
    left_behind(marker, home.store / JOB, run_id=run_id)
    found = reap(home.store, grace_s=0.0)
    assert [entry.run_failed for entry in found] == [False, True, False]
    assert RECORD_NAME in found[0].note
    assert "a-broken-one.json" in found[2].note
    assert home.held == 0


def test_the_next_start_closes_dead_runs_before_anything_waits_for_their_slot(home: Home) -> None:
    dead, foreign = home.run(dead_orchestrator()), str(uuid.uuid4())
    identity = InstanceIdentity.of(home.instance)
    assert identity is not None
    elsewhere = replace(dead_orchestrator(), host="elsewhere")
    RunRecord(foreign, elsewhere, identity).write(path_of(home.store, foreign))
    said: list[str] = []
    close_dead_runs(home.store, said.append)
    assert said == [f"Run {dead}, whose process was killed, is marked failed."]
    assert home.held == 0
    close_dead_runs(home.store, pytest.fail)  # another host's run is its own business


def test_another_hosts_run_is_named_with_the_command_that_gives_that_host_up(home: Home) -> None:
    run_id = home.run(replace(dead_orchestrator(), host="node-17"))
    (found,) = reap(home.store)
    assert (found.dagster_run_id, found.run_failed) == (run_id, False)
    assert "vpmoe reap --host-gone node-17" in found.note
    assert home.held == 1


def test_a_host_that_is_gone_lets_go_of_its_runs_slots_and_work_directories(
    home: Home, marker: str, start: Start
) -> None:
    innocent = start(DEAF)  # carries the marker, but here: it cannot be the job's
    run_id = home.run(replace(dead_orchestrator(), host="node-17"))
    on_host("node-17", left_behind(marker, home.store / JOB, run_id=run_id)).write(home.store / JOB)
    other = home.store / ".work" / "smoke" / "other-01234567"
    on_host("node-18", left_behind(marker, other)).write(other)
    (found,) = give_up_host(home.store, "node-17")
    assert (found.asset, found.run_failed, found.note) == ("vpmoe_stage1", True, "")
    assert (home.status(run_id), home.held) == (dg.DagsterRunStatus.FAILURE, 0)
    assert settle(home.store / JOB, grace_s=0.0) is None
    assert (other / RECORD_NAME).exists()  # only jobs recorded on exactly that host
    assert innocent.poll() is None


def test_this_host_and_hosts_of_which_nothing_is_known_are_not_given_up(home: Home, marker: str) -> None:
    work = home.store / JOB
    record = left_behind(marker, work)
    with pytest.raises(HostNotGoneError, match="is this machine"):
        give_up_host(home.store, record.orchestrator.host)
    on_host("node-17", record).write(work)
    with pytest.raises(HostNotGoneError, match="'node-1'; other hosts on record: node-17"):
        give_up_host(home.store, "node-1")
    assert (work / RECORD_NAME).exists()


def test_an_instance_is_opened_from_any_directory_though_its_configuration_is_relative(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "dagster.yaml").write_bytes((Path(__file__).parents[2] / "dagster.yaml").read_bytes())
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)

    @dg.job
    def nothing() -> None:
        pass

    with dg.DagsterInstance.from_config(str(tmp_path)) as instance:
        run_id = instance.create_run_for_job(nothing).run_id
        identity = InstanceIdentity.of(instance)
    assert identity is not None
    assert identity.root == str(tmp_path / ".dagster")
    monkeypatch.chdir(tmp_path / "elsewhere")
    with identity.open() as again:
        assert again.get_run_by_id(run_id) is not None
    assert not any((tmp_path / "elsewhere").iterdir())


def test_an_instance_in_memory_has_no_identity_and_one_that_is_gone_is_not_made_anew(tmp_path: Path) -> None:
    assert InstanceIdentity.of(dg.DagsterInstance.ephemeral()) is None
    with (
        pytest.raises(InstanceUnavailableError, match="any more"),
        InstanceIdentity(str(tmp_path / "x"), {}).open(),
    ):
        pass
    assert not (tmp_path / "x").exists()
