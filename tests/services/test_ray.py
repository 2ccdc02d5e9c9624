"""Shards and jobs on a real Ray cluster of two machines; what dies is begun again, and no byte changes."""

import importlib.util
import json
import os
import pickle
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.assets.conftest import tiny_made  # noqa: F401 - a fixture
from tests.assets.graphs import Graph, copy_store, stand_in_trainer
from tests.harmony.conftest import tokenizer_dir  # noqa: F401 - a fixture
from tests.harmony.inputs import SEQ_LEN, rows, tree, write
from tests.resources.launched import PROGRAMS, ROOT, carrying, failure_message
from tests.services.cluster import wait_until
from tests.services.programs.slow_shards import Slow
from tests.services.ray_cluster import NODES, RayCluster
from trainer.contract.scaffold import Scaffold
from vpmoe_assets.errors import DataError, WorkerError
from vpmoe_assets.harmony.build import synth_worker
from vpmoe_assets.harmony.kd import KdWorker
from vpmoe_assets.harmony.kd_config import KdConfig
from vpmoe_assets.harmony.pool import run_shards
from vpmoe_assets.resources.shards import ShardsResource

pytestmark = [
    pytest.mark.services,
    pytest.mark.ray,
    pytest.mark.timeout(300),
    pytest.mark.skipif(
        importlib.util.find_spec("ray") is None, reason="Ray is not installed; `make ray` adds it"
    ),
]

SHARDS = 4


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return write(tmp_path_factory.mktemp("synth") / "a.parquet", rows(240), group=10)


@pytest.fixture
def make_worker(source, tokenizer_dir, tmp_path) -> Callable[[str], KdWorker]:  # noqa: F811
    def make(name: str) -> KdWorker:
        config = KdConfig(SEQ_LEN, 0.1, -1, 1024)
        return synth_worker(
            [source], tmp_path / name, tokenizer_dir, config, scaffold=Scaffold(), num_shards=SHARDS
        )

    return make


@pytest.fixture(scope="module")
def expected(source, tokenizer_dir, tmp_path_factory) -> tuple[list[Any], dict[str, Any]]:  # noqa: F811
    """What processes of this machine make: results and files."""
    config = KdConfig(SEQ_LEN, 0.1, -1, 1024)
    work = tmp_path_factory.mktemp("expected") / "kd"
    worker = synth_worker([source], work, tokenizer_dir, config, scaffold=Scaffold(), num_shards=SHARDS)
    return run_shards(worker, SHARDS, 1), tree(worker.payload_dir)


@pytest.fixture(scope="module")
def running() -> Iterator[RayCluster]:
    with tempfile.TemporaryDirectory(prefix="vpmoe-ray-") as place:
        started = RayCluster(Path(place))
        try:
            started.start()
            yield started
        finally:
            started.stop()


@pytest.fixture
def cluster(running: RayCluster, monkeypatch: pytest.MonkeyPatch) -> RayCluster:
    """Two machines, for this process and what it starts."""
    for name, value in running.environment.items():
        monkeypatch.setenv(name, value)
    return running


class Counted:
    def __init__(self) -> None:
        self.rows = 0

    def advance(self, rows: int) -> None:
        self.rows += rows


class Trial:
    """Shards on the cluster, slowly, so that something can happen meanwhile."""

    def __init__(self, worker: KdWorker, place: Path, seconds: float = 0.4, **settings: Any) -> None:
        self.slow = Slow(worker, seconds, place / "notes")
        self.place, self.said = place, list[str]()
        self.settings = {"node_ip": NODES[0], **settings}
        self.progress = Counted()

    def run(self) -> list[Any]:
        shards = ShardsResource(engine="ray", engine_settings=self.settings)
        engine = shards.open(self.place / "scratch", self.said.append)
        assert engine is not None
        return engine(self.slow, len(self.slow.worker.sources), self.progress)

    def run_while(self, happens: Callable[[], None]) -> list[Any]:
        wrong: list[BaseException] = []

        def watched() -> None:
            try:
                happens()
            except BaseException as error:
                wrong.append(error)

        thread = threading.Thread(target=watched)
        thread.start()
        try:
            return self.run()
        finally:
            thread.join()
            assert not wrong, wrong

    def begun(self) -> dict[int, list[int]]:
        """Processes that began each shard."""
        found: dict[int, list[int]] = {}
        for note in sorted((self.place / "notes").glob("*.*"), key=lambda path: path.stat().st_mtime):
            shard, pid = note.name.split(".")
            found.setdefault(int(shard), []).append(int(pid))
        return found


def kill_a_worker(trial: Trial) -> None:
    wait_until(lambda: len(trial.begun()) >= 2, "two shards at work", 60)
    time.sleep(0.6)
    psutil.Process(next(iter(trial.begun().values()))[0]).kill()


def test_shards_are_worked_on_by_all_machines_and_are_what_one_machine_makes(
    cluster: RayCluster, make_worker, expected, tmp_path
) -> None:
    trial = Trial(make_worker("kd"), tmp_path, 0.2)
    assert trial.run() == expected[0]
    assert tree(trial.slow.worker.payload_dir) == expected[1]
    assert trial.progress.rows == 240
    assert len({pid for pids in trial.begun().values() for pid in pids}) >= 2
    again = trial.run()  # another driver: what is finished is found
    assert all(shard["reused"] for shard in again)
    assert not trial.said


def test_a_worker_that_is_killed_is_begun_again_and_no_byte_changes(
    cluster: RayCluster, make_worker, expected, tmp_path
) -> None:
    trial = Trial(make_worker("kd"), tmp_path)
    results = trial.run_while(lambda: kill_a_worker(trial))
    assert [{**shard, "reused": False} for shard in results] == expected[0]
    assert tree(trial.slow.worker.payload_dir) == expected[1]
    assert len(trial.said) == 1
    assert "its process or its machine died" in trial.said[0]
    assert "begun again (1 of 3)" in trial.said[0]
    assert trial.progress.rows == 240


def test_deaths_are_forgiven_as_often_as_is_said(cluster: RayCluster, make_worker, tmp_path) -> None:
    trial = Trial(make_worker("kd"), tmp_path, retries=0)
    with pytest.raises(WorkerError, match=r"died .*, 1 times\. Finished shards are kept"):
        trial.run_while(lambda: kill_a_worker(trial))
    wait_gone(trial)


def wait_gone(trial: Trial) -> None:
    """Nothing of a trial is at work in the cluster a moment after its driver has ended."""

    def working() -> list[int]:
        pids = {pid for pids in trial.begun().values() for pid in pids}
        return [pid for pid in pids if psutil.pid_exists(pid) and psutil.Process(pid).status() != "zombie"]

    wait_until(lambda: not working(), "no task in the cluster", 20)


def test_a_machine_that_is_lost_is_done_without_and_no_byte_changes(
    cluster: RayCluster, make_worker, expected, tmp_path
) -> None:
    trial = Trial(make_worker("kd"), tmp_path)

    def lose() -> None:
        wait_until(lambda: len(trial.begun()) >= 2, "two shards at work", 60)
        cluster.lose_node(NODES[1])

    try:
        results = trial.run_while(lose)
        assert [{**shard, "reused": False} for shard in results] == expected[0]
        assert tree(trial.slow.worker.payload_dir) == expected[1]
        assert trial.said
    finally:
        cluster.start_node(NODES[1])


def test_an_orchestrator_that_is_killed_leaves_nothing_and_the_next_goes_on(
    cluster: RayCluster, make_worker, expected, tmp_path
) -> None:
    trial = Trial(make_worker("kd"), tmp_path)
    (tmp_path / "worker").write_bytes(pickle.dumps(trial.slow))
    command = [sys.executable, "-m", "tests.services.programs.slow_shards", str(tmp_path / "worker")]
    process = subprocess.Popen([*command, str(SHARDS), str(tmp_path / "scratch"), NODES[0]], cwd=ROOT)
    try:
        wait_until(lambda: len(trial.begun()) >= 3, "two shards at work after a finished one", 90)
    finally:
        process.kill()
        process.wait()
    trial.slow = replace(trial.slow, seconds=0.05)  # the next comes at once, while tasks may still be ending
    results = trial.run()
    wait_gone(trial)
    assert any(shard["reused"] for shard in results)
    assert [{**shard, "reused": False} for shard in results] == expected[0]
    assert tree(trial.slow.worker.payload_dir) == expected[1]


def test_what_a_worker_raises_arrives_as_it_was_raised(cluster: RayCluster, tokenizer_dir, tmp_path) -> None:  # noqa: F811
    content = rows(40)
    content[17]["synth_id"] = ""
    worker = synth_worker(
        [write(tmp_path / "bad.parquet", content)],
        tmp_path / "kd",
        tokenizer_dir,
        KdConfig(SEQ_LEN, 0.1, -1, 1024),
        scaffold=Scaffold(),
        num_shards=2,
    )
    with pytest.raises(DataError, match=r"shard 00, row 17 .*synth_id is missing"):
        Trial(worker, tmp_path, 0.0).run()


def test_a_machine_that_does_not_see_the_files_is_refused_by_name(
    cluster: RayCluster, make_worker, tmp_path
) -> None:
    hidden = ["unshare", "--mount", "sh", "-c", f'mount -t tmpfs none {tmp_path} && exec "$@"', "sh"]
    if os.geteuid() != 0 or subprocess.run([*hidden, "true"], check=False, capture_output=True).returncode:
        pytest.skip("only root may hide a directory from a process")
    cluster.lose_node(NODES[1])
    try:
        cluster.start_node(NODES[1], *hidden)
        trial = Trial(make_worker("kd"), tmp_path)
        with pytest.raises(DataError, match=rf"{NODES[1]}\) does not see .*on a file system that all"):
            trial.run()
        assert not trial.begun()
        assert not list(tmp_path.rglob(".ray-probe-*"))
    finally:
        cluster.lose_node(NODES[1])
        cluster.start_node(NODES[1])


def test_another_token_is_refused_in_a_line(cluster: RayCluster, make_worker, tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "0" * 32)
    trial = Trial(make_worker("kd"), tmp_path, connect_s=20)
    with pytest.raises(DataError, match="cannot be used from this machine") as refused:
        trial.run()
    assert "\n" not in str(refused.value)


@pytest.fixture
def run(run_stand_in, tmp_path, cluster, test_id) -> Iterator[Callable[..., Any]]:
    def on_cluster(recipe: dict[str, Any], **settings: Any) -> Any:
        return run_stand_in(recipe, launcher="ray", launcher_settings={"node_ip": NODES[0]}, **settings)

    yield on_cluster
    wait_until(lambda: not carrying(test_id), "no processes", 30)


def starts(work: Path) -> list[int]:
    lines = (work / "log.txt").read_text().splitlines()
    return [int(line.rpartition(" ")[2]) for line in lines if line.startswith("rank 0 starts after")]


def test_a_job_whose_worker_is_killed_goes_on_from_its_checkpoint(run, tmp_path) -> None:
    work = tmp_path / "work"

    def kill() -> None:
        log = work / "log.txt"
        wait_until(lambda: log.exists() and "saved step 5" in log.read_text(), "a checkpoint", 60)
        psutil.Process(json.loads((work / ".ray.json").read_text())["pid"]).parent().kill()

    killer = threading.Thread(target=kill)
    killer.start()
    result, trained = run({"steps": 120, "step_s": 0.1, "save_every": 5})
    killer.join()
    assert result.success, failure_message(result)
    assert (trained.summary["steps"], trained.returncode) == (120, 0)
    first, again = starts(work)
    assert first == 0
    assert again >= 5
    assert "started again, 1 of 3" in (work / "console.txt").read_text()


def test_a_job_that_fails_says_why_and_several_ranks_are_refused(run) -> None:
    result, _ = run({"steps": 5, "fail_at": 3})
    assert "loss is NaN at step 3" in failure_message(result)
    result, _ = run({"steps": 5}, nproc=2, dp=2)
    assert "jobs of one rank, and nproc = 2" in failure_message(result)


def test_a_killed_orchestrator_takes_its_job_in_the_cluster_along(cluster, tmp_path, test_id) -> None:
    work = tmp_path / "work"
    asked = {"recipe": {"steps": 900, "step_s": 0.1, "save_every": 5}, "launcher": "ray", "poll_s": 0.2}
    asked |= {"launcher_settings": {"node_ip": NODES[0]}, "grace_s": 30.0}
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.services.programs.orchestrator", str(work), json.dumps(asked)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PROGRAMS)])},
    )
    try:
        log = work / "log.txt"
        wait_until(lambda: log.exists() and "saved step 5" in log.read_text(), "a checkpoint", 90)
    finally:
        process.kill()
        process.wait()
    wait_until(lambda: not carrying(test_id), "no processes", 30)
    assert (work / "STATUS").read_text().startswith("interrupted")


def test_data_and_scores_of_an_experiment_are_the_same_on_the_cluster(
    cluster: RayCluster,
    tiny_made,  # noqa: F811
    tmp_path,
    monkeypatch,
) -> None:
    made, _ = tiny_made
    trainer = stand_in_trainer(monkeypatch, "stand_in_distillation", score_workers=2)
    shards = ShardsResource(engine="ray", engine_settings={"node_ip": NODES[0]})
    here = Graph(made.experiment, copy_store(made.root, tmp_path / "here"), resources={"trainer": trainer})
    here.make("vpmoe_stage1", "teacher")
    there = Graph(
        made.experiment,
        copy_store(here.root, tmp_path / "there"),
        resources={"trainer": trainer, "shards": shards},
    )
    here.make("teacher_topk")
    before = there.latest("synth_kd_v1")
    there.make("synth_kd_v1")  # the engine is no part of the identity: what was made here is reused
    assert there.latest("synth_kd_v1").version == before.version
    there.make("teacher_topk")
    ours, theirs = here.latest("teacher_topk"), there.latest("teacher_topk")
    assert (ours.fingerprint, ours.digest) == (theirs.fingerprint, theirs.digest)
    assert (ours.execution["launcher"], theirs.execution["launcher"]) == ("local", "ray")
    anew = Graph(made.experiment, tmp_path / "anew", resources={"shards": shards})
    anew.make("synth", "o200k_tokenizer", "synth_harmony", "synth_kd_v1")
    for name in ("synth_harmony", "synth_kd_v1"):
        first, second = made.latest(name), anew.latest(name)
        assert (first.fingerprint, first.digest) == (second.fingerprint, second.digest)
        assert second.execution["engine"] == "ray"
        assert cluster.environment["RAY_AUTH_TOKEN"] not in second.model_dump_json()
