"""What the store's resource does before the first step of a run."""

import os
from pathlib import Path

import dagster as dg
import pytest

from tests.forks import Forks
from tests.resources.launched import ROOT
from tests.resources.marked import dead_orchestrator
from vpmoe_assets.resources.instances import InstanceIdentity
from vpmoe_assets.resources.process_record import Orchestrator
from vpmoe_assets.resources.run_record import RunRecord, path_of, paths
from vpmoe_assets.resources.store import StoreResource


def materialize(store: Path, instance: dg.DagsterInstance, **options: bool) -> dg.ExecuteInProcessResult:
    @dg.asset
    def made(context: dg.AssetExecutionContext, store: StoreResource) -> dg.MaterializeResult:
        path = path_of(Path(store.root), context.run.run_id)
        here = path.exists() and RunRecord.read(path).orchestrator == Orchestrator.this()
        return dg.MaterializeResult(metadata={"recorded": here})

    resources = {"store": StoreResource(root=str(store))}
    return dg.materialize([made], instance=instance, resources=resources, **options)


def recorded(result: dg.ExecuteInProcessResult) -> object:
    (event,) = result.get_asset_materialization_events()
    return event.materialization.metadata["recorded"].value


def failure(result: dg.ExecuteInProcessResult) -> str:
    """Why the run ended before its first step."""
    (event,) = [event for event in result.all_events if event.is_failure]
    error = event.job_failure_data.error
    assert error is not None
    assert error.cause is not None
    return error.cause.message


def test_a_run_is_recorded_while_its_process_lives(tmp_path: Path, forks: Forks) -> None:
    program = (
        "import sys, pathlib, dagster as dg\n"
        "from tests.resources.test_store import materialize, recorded\n"
        "store = pathlib.Path(sys.argv[1])\n"
        "with dg.DagsterInstance.local_temp(sys.argv[2]) as instance:\n"
        "    print(recorded(materialize(store, instance)))\n"
        "print(len(list((store / '.work' / '.runs').iterdir())))\n"
    )
    (tmp_path / "home").mkdir()
    ran = forks.run(
        ["-c", program, str(tmp_path / "store"), str(tmp_path / "home")],
        environment=os.environ,
        directory=ROOT,
    )
    assert ran.stdout.split() == ["True", "1"], ran.stderr
    assert list(paths(tmp_path / "store")) == []


def test_a_run_of_an_instance_in_memory_is_not_recorded(tmp_path: Path) -> None:
    assert recorded(materialize(tmp_path, dg.DagsterInstance.ephemeral())) is False
    assert list(paths(tmp_path)) == []


def test_a_slot_that_a_killed_run_holds_is_free_before_the_next_run_waits_for_it(tmp_path: Path) -> None:
    with dg.DagsterInstance.local_temp(str(tmp_path)) as instance:
        instance.event_log_storage.set_concurrency_slots("gpu", 1)

        @dg.asset(pool="gpu")
        def made(store: StoreResource) -> None: ...

        resources = {"store": StoreResource(root=str(tmp_path / "store"))}
        job = dg.Definitions(assets=[made], resources=resources).resolve_implicit_global_asset_job_def()
        killed = instance.create_run_for_job(job, status=dg.DagsterRunStatus.STARTED).run_id
        instance.event_log_storage.claim_concurrency_slot("gpu", killed, "made")
        identity = InstanceIdentity.of(instance)
        assert identity is not None
        RunRecord(killed, dead_orchestrator(), identity).write(path_of(tmp_path / "store", killed))
        assert dg.materialize([made], instance=instance, resources=resources).success
        run = instance.get_run_by_id(killed)
        assert run is not None
        assert run.status == dg.DagsterRunStatus.FAILURE
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 0


def test_a_run_whose_history_would_be_thrown_away_is_refused(tmp_path: Path) -> None:
    home = tmp_path / ".tmp_dagster_home_x1"
    home.mkdir()
    with dg.DagsterInstance.local_temp(str(home)) as instance:
        result = materialize(tmp_path / "store", instance, raise_on_error=False)
    assert not result.success
    said = failure(result)
    assert "throw the history of this run away" in said
    assert "make setup" in said


def test_storage_relative_to_the_wrong_directory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "dagster.yaml").write_bytes((ROOT / "dagster.yaml").read_bytes())
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    with dg.DagsterInstance.get() as instance:
        said = failure(materialize(tmp_path / "store", instance, raise_on_error=False))
    assert f"DAGSTER_HOME is {tmp_path / 'home'}" in said
    assert f"was started in {tmp_path}" in said
    monkeypatch.chdir(tmp_path / "home")
    with dg.DagsterInstance.get() as instance:
        assert materialize(tmp_path / "store", instance).success
