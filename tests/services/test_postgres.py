"""Dagster on PostgreSQL, as a team has it, beside SQLite, as one person has it."""

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import dagster as dg
import pytest

from tests.assets.graphs import write_experiment
from tests.resources.launched import PROGRAMS, ROOT, carrying
from tests.services.cluster import wait_until
from tests.services.postgres import Postgres
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.lineage.verify import verify_record

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(300)]

ASSETS = ("o200k_tokenizer", "synth", "healing_corpus")
RUNS = 10


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home of Dagster's with SQLite, as the checkout's own."""
    home = tmp_path / "dagster"
    home.mkdir()
    text = (ROOT / "dagster.yaml").read_text()
    (home / "dagster.yaml").write_text(text.replace("base_dir: .dagster", f"base_dir: {home}/files"))
    monkeypatch.setenv("DAGSTER_HOME", str(home))
    return home


@pytest.mark.parametrize("storage", ["sqlite", "postgres"])
def test_ten_runs_at_once_on_one_store_make_each_thing_once_and_end(
    storage, request, forks, tmp_path
) -> None:
    request.getfixturevalue("team" if storage == "postgres" else "alone")
    root = tmp_path / "artifacts"
    with dg.DagsterInstance.get():  # Dagster's own tables are made by one process, once
        pass

    def materialize(number: int) -> subprocess.CompletedProcess[str]:
        name = f"team{number // 2}"
        rows = {'name = "tiny"': f'name = "{name}"', "rows = 60\n": f"rows = {60 + number // 2}\n"}
        file = tmp_path / str(number) / f"{name}.toml"
        file.parent.mkdir()
        text = write_experiment(file).read_text()
        for old, new in rows.items():
            assert text.count(old) == 1, old
            text = text.replace(old, new)
        file.write_text(text)
        selected = ",".join(f"{name}/{asset}" for asset in ASSETS)
        return forks.run(
            ["-m", "dagster", "asset", "materialize", "-m", "vpmoe_assets.definitions", "--select", selected],
            environment={**os.environ, "VPMOE_ARTIFACTS": str(root), "VPMOE_EXPERIMENT": str(file)},
            directory=tmp_path / "dagster",  # the checkout has an .env, which names another home
        )

    with ThreadPoolExecutor(RUNS) as runs:
        done = list(runs.map(materialize, range(RUNS)))
    for each in done:
        assert each.returncode == 0, each.stdout + each.stderr
    store = Store(root)
    records = list(store.records())
    assert Counter((record.experiment, record.asset) for record in records) == {
        (f"team{number}", asset): 1 for number in range(RUNS // 2) for asset in ASSETS
    }
    assert len({record.digest for record in records if record.asset == "synth"}) == RUNS // 2
    seen: set[str] = set()
    assert [problem for record in records for problem in verify_record(store, record, seen=seen)] == []
    (counted,) = Index(root / "index.duckdb").query("SELECT count(*) AS n FROM artifacts").rows
    assert counted[0] == len(records)
    with dg.DagsterInstance.get() as instance:
        ended = instance.get_runs()
        assert Counter(run.status for run in ended) == {dg.DagsterRunStatus.SUCCESS: RUNS}
        pools = instance.event_log_storage.get_concurrency_keys()
        assert all(not instance.event_log_storage.get_concurrency_info(pool).claimed_slots for pool in pools)
        materialised = {key.to_user_string() for key in instance.all_asset_keys()}
        assert {f"team{number}/synth" for number in range(RUNS // 2)} <= materialised
    assert not list((root / ".work" / ".runs").glob("*"))


@contextmanager
def running(tmp_path: Path, recipe: dict[str, object]) -> Iterator[subprocess.Popen[bytes]]:
    """A run of Dagster's whose job has made a checkpoint."""
    job = {
        "program": "stand_in_trainer",
        "command": "evaluate",
        "recipe": recipe,
        "inputs": {"donor": str(tmp_path / "donor")},
        "device": "cpu",
        "nproc": 1,
    }
    path = os.pathsep.join([str(ROOT), str(PROGRAMS)])
    environment = {**os.environ, "CANCEL_JOB": json.dumps(job), "PYTHONPATH": path}
    with (tmp_path / "run.txt").open("ab") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "dagster", "asset", "materialize", "--select", "slow_checkpoint"),
                *("-m", "tests.resources.programs.cancel_definitions"),
            ],
            cwd=tmp_path / "dagster",
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        yield process
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def saved(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Wait until the job has saved a step."""
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path / "artifacts"))

    def wait(step: int) -> None:
        def there() -> bool:
            logs = (tmp_path / "artifacts").glob(".work/test/*/log.txt")
            return any(f"saved step {step}\n" in log.read_text() for log in logs)

        wait_until(there, f"step {step}", 90, lambda: (tmp_path / "run.txt").read_text())

    return wait


def runs_of(status: dg.DagsterRunStatus) -> int:
    with dg.DagsterInstance.get() as instance:
        return sum(run.status == status for run in instance.get_runs())


def test_a_server_that_is_away_for_a_while_costs_a_run_nothing(
    team: tuple[Path, Postgres], saved, tmp_path, test_id
) -> None:
    _, server = team
    before = runs_of(dg.DagsterRunStatus.SUCCESS)
    with running(tmp_path, {"steps": 150, "step_s": 0.1, "save_every": 5}) as process:
        saved(5)
        server.stop()
        try:
            time.sleep(5.0)
        finally:
            server.start()
        assert process.wait(90) == 0, (tmp_path / "run.txt").read_text()
    assert runs_of(dg.DagsterRunStatus.SUCCESS) == before + 1
    with dg.DagsterInstance.get() as instance:
        event = instance.get_latest_materialization_event(dg.AssetKey("slow_checkpoint"))
        assert event is not None
        assert json.dumps(150) in str(event.asset_materialization.metadata["summary"].value)
    wait_until(lambda: not carrying(test_id), "no processes", 20)


def test_a_run_killed_while_the_server_is_away_is_closed_and_the_next_goes_on(
    team: tuple[Path, Postgres], forks, saved, tmp_path, test_id
) -> None:
    _, server = team
    recipe = {"steps": 300, "step_s": 0.1, "save_every": 5}
    failed = runs_of(dg.DagsterRunStatus.FAILURE)
    with running(tmp_path, recipe) as process:
        saved(5)
        server.stop()
        process.kill()
        process.wait()
        server.start()
    assert runs_of(dg.DagsterRunStatus.STARTED) == 1  # which holds the slot of its pool
    done = forks.run(["-m", "vpmoe_assets.cli", "reap", "--json"], environment=os.environ, directory=ROOT)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)[0]["run_failed"]
    assert runs_of(dg.DagsterRunStatus.FAILURE) == failed + 1
    with running(tmp_path, {**recipe, "steps": 30}) as process:
        assert process.wait(120) == 0, (tmp_path / "run.txt").read_text()
    assert "starts after step 0" not in (tmp_path / "run.txt").read_text().partition("saved step 5\n")[2]
    wait_until(lambda: not carrying(test_id), "no processes", 20)
