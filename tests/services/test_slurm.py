"""Jobs on a real Slurm cluster of two machines; only the trainer itself is a stand-in, and once not that."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.lineage.fabricate import files_below
from tests.resources.launched import PROGRAMS, ROOT, carrying, failure_message
from tests.services.cluster import NODES, Cluster, kill_tree, wait_until
from vpmoe_assets.resources.detached import RECORD_NAME, DetachedJob
from vpmoe_assets.resources.launcher import Launch
from vpmoe_assets.resources.launchers import local, slurm
from vpmoe_assets.resources.processes import new_marker

pytestmark = [pytest.mark.services, pytest.mark.slow, pytest.mark.timeout(300)]

LONG = {"steps": 400, "step_s": 0.1, "save_every": 5}
WATCHED = {**LONG, "steps": 120}
"""For jobs whose end is waited for."""
SHORT = {"poll_s": 0.3}


@pytest.fixture
def work(tmp_path: Path, cluster: Cluster, test_id: str) -> Iterator[Path]:
    """The work directory; no process and no record of a job is left when the test is over."""
    yield tmp_path / "work"
    wait_until(lambda: not cluster.jobs(), "no jobs", 30, lambda: cluster.ask("squeue"))
    wait_until(lambda: not carrying(test_id), "no processes", 20)


@pytest.fixture
def run(run_stand_in, work: Path) -> Callable[..., Any]:
    """Runs the stand-in on the cluster."""

    def on_cluster(recipe: dict[str, Any], *, slurm: dict[str, Any] | None = None, **settings: Any) -> Any:
        return run_stand_in(
            recipe, launcher="slurm", launcher_settings={**SHORT, **(slurm or {})}, **settings
        )

    return on_cluster


class Meanwhile:
    """Does something beside a run, and says afterwards whether it worked."""

    def __init__(self, *steps: Callable[[], object]) -> None:
        self.wrong: BaseException | None = None
        self.thread = threading.Thread(target=self._do, args=(steps,))

    def _do(self, steps: tuple[Callable[[], object], ...]) -> None:
        try:
            for step in steps:
                step()
        except BaseException as error:
            self.wrong = error

    def __enter__(self) -> None:
        self.thread.start()

    def __exit__(self, *_: object) -> None:
        self.thread.join()
        if self.wrong is not None:
            raise self.wrong


def says(work: Path, text: str, times: int = 1) -> Callable[[], None]:
    """Wait until the job's log says something."""
    log = work / "log.txt"

    def wait() -> None:
        wait_until(
            lambda: log.exists() and log.read_text().count(text) >= times,
            text,
            60,
            lambda: "\n".join(path.read_text() for path in work.glob("*.txt")),
        )

    return wait


def starts(work: Path) -> list[int]:
    """From which steps the job began, start by start."""
    lines = (work / "log.txt").read_text().splitlines()
    return [int(line.rpartition(" ")[2]) for line in lines if line.startswith("rank 0 starts after")]


def job_of(work: Path) -> str:
    record = DetachedJob.read(work)
    assert record is not None
    assert record.job_id is not None
    return record.job_id


@pytest.fixture
def orchestrator(
    work: Path, tmp_path: Path, cluster: Cluster, request: pytest.FixtureRequest
) -> Iterator[subprocess.Popen[bytes]]:
    """A process that runs a long job on the cluster, which has made a checkpoint."""
    recipe = getattr(request, "param", LONG)
    asked = {
        "recipe": recipe,
        "launcher": "slurm",
        "launcher_settings": SHORT,
        "poll_s": 0.2,
        "grace_s": 30.0,
    }
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(PROGRAMS)])}
    with (tmp_path / "orchestrator.txt").open("wb") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.programs.orchestrator", str(work), json.dumps(asked)],
            cwd=ROOT,
            env=environment,
            stdout=output,
            stderr=output,
        )
    try:
        says(work, "saved step 5")()
        yield process
    finally:
        process.kill()
        process.wait()


ends_soon = pytest.mark.parametrize("orchestrator", [WATCHED], indirect=True, ids=["120 steps"])


def test_a_job_runs_on_a_machine_of_the_cluster(run, work) -> None:
    result, trained = run({"steps": 5})
    assert result.success, failure_message(result)
    assert (trained.summary["steps"], trained.returncode, trained.devices) == (5, 0, ())
    assert trained.execution["launcher"] == "slurm"
    observed = [e.asset_observation_data.asset_observation for e in result.get_asset_observation_events()]
    assert [o.metadata["step"].value for o in observed] == [1, 2, 3, 4, 5]
    assert not (work / RECORD_NAME).exists()
    assert "#SBATCH --requeue" in (work / ".slurm" / "batch.sh").read_text()


def test_a_job_that_fails_says_why(run, work) -> None:
    result, _ = run({"steps": 5, "fail_at": 3})
    assert "loss is NaN at step 3" in failure_message(result)
    result, _ = run({"steps": 5, "die_at": 3}, fingerprint="a" * 64)
    assert "ended without a word" in failure_message(result)  # of its console
    assert not (work / RECORD_NAME).exists()


@pytest.mark.parametrize(
    ("slurm", "message"),
    [
        ({"partition": "nonesuch"}, r"Slurm refused the job: .*invalid partition"),
        ({"partitoin": "main"}, r"nearest valid key is 'partition'"),
        ({"directives": ["--nodes=7"]}, r"--nodes is decided by the launcher"),
    ],
)
def test_what_the_cluster_cannot_do_is_refused(run, work, slurm, message) -> None:
    result, _ = run({"steps": 1}, slurm=slurm)
    assert not result.success
    assert re.search(message, failure_message(result)), failure_message(result)
    assert not (work / RECORD_NAME).exists()


def test_an_interrupt_of_the_orchestrator_ends_the_job_with_a_checkpoint(orchestrator, work, cluster) -> None:
    orchestrator.send_signal(signal.SIGINT)
    orchestrator.wait(60)
    assert cluster.jobs() == []
    assert (work / "STATUS").read_text() == "interrupted\n"
    assert not (work / RECORD_NAME).exists()
    saved = max(int(path.name[5:]) for path in (work / "checkpoints").glob("iter_*"))
    assert saved % 5 or saved > 5
    assert "Sent SIGINT to job" in (work.parent / "orchestrator.txt").read_text()


@ends_soon
def test_a_job_outlives_its_orchestrator_and_is_followed_to_its_end(orchestrator, work, run) -> None:
    kill_tree(orchestrator)
    says(work, "saved step 15")()
    job = job_of(work)
    result, trained = run({**LONG, "steps": 40})  # another recipe is not looked at: the job has its own
    assert result.success, failure_message(result)
    assert starts(work) == [0]
    assert trained.summary == {"steps": 120, "started_after": 0}
    steps = [json.loads(line)["step"] for line in (work / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 121))
    assert job


@ends_soon
def test_one_that_has_ended_meanwhile_is_taken_as_it_is(orchestrator, work, run, cluster) -> None:
    kill_tree(orchestrator)
    wait_until(lambda: not cluster.jobs(), "the end", 90)
    result, trained = run(WATCHED)
    assert result.success, failure_message(result)
    assert starts(work) == [0]
    assert trained.reused


def test_it_is_ended_and_started_anew_where_the_settings_say_so(orchestrator, work, run) -> None:
    kill_tree(orchestrator)
    result, _ = run({**LONG, "steps": 60}, slurm={"on_restart": "cancel"})
    assert result.success, failure_message(result)
    first, second = starts(work)
    assert first == 0
    assert second >= 5


def test_it_is_left_alone_where_the_settings_say_so_and_by_every_other_launcher(
    orchestrator, work, run, run_stand_in, cluster
) -> None:
    kill_tree(orchestrator)
    result, _ = run(LONG, slurm={"on_restart": "refuse"})
    assert f"job {job_of(work)} of Slurm" in failure_message(result)
    assert 'on_restart = "refuse"' in failure_message(result)
    result, _ = run_stand_in(LONG)
    assert 'use launcher = "slurm", which follows it' in failure_message(result)
    assert cluster.jobs() == [job_of(work)]
    cluster.ask("scancel", job_of(work))
    wait_until(lambda: not cluster.jobs(), "the end", 30)
    result, _ = run_stand_in({"steps": 3})  # what is over is in nobody's way
    assert result.success, failure_message(result)
    assert not (work / RECORD_NAME).exists()


@ends_soon
def test_a_job_whose_id_was_never_noted_is_found_by_its_name(orchestrator, work, run) -> None:
    kill_tree(orchestrator)
    record = json.loads((work / RECORD_NAME).read_text())
    (work / RECORD_NAME).write_text(json.dumps({**record, "job_id": None}))
    (work / ".slurm" / "started").unlink()
    result, _ = run(WATCHED)
    assert result.success, failure_message(result)
    assert starts(work) == [0]


def test_a_lost_machine_gives_its_job_to_another_which_goes_on_from_the_checkpoint(
    run, work, cluster
) -> None:
    def lose() -> None:
        (node,) = {line for line in cluster.ask("squeue", "-h", "-o", "%N").split() if line}
        cluster.ask("scontrol", "update", f"nodename={node}", "state=down", "reason=lost")

    with Meanwhile(says(work, "saved step 5"), lose, cluster.hasten):
        result, trained = run({**LONG, "steps": 60})
    for node in NODES:
        cluster.ask("scontrol", "update", f"nodename={node}", "state=resume")
    assert result.success, failure_message(result)
    first, second = starts(work)
    assert first == 0
    assert second >= 5
    assert trained.summary["steps"] == 60


def test_one_that_is_told_to_stop_and_that_nobody_wants_to_end_queues_itself_again(
    run, work, cluster
) -> None:
    # As when its time is up: Slurm sends the same signal then.
    with Meanwhile(
        says(work, "saved step 5"),
        lambda: cluster.ask("scancel", "--signal=INT", job_of(work)),
        cluster.hasten,
    ):
        result, _ = run({**LONG, "steps": 60})
    assert result.success, failure_message(result)
    first, second = starts(work)
    assert first == 0
    assert second > 5
    assert "it is queued again" in (work / "console.txt").read_text()


def test_a_preempted_job_writes_a_checkpoint_and_comes_back(run, work, cluster) -> None:
    def urgent() -> None:
        cluster.ask("sbatch", "-p", "urgent", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 1")
        wait_until(lambda: "urgent" in cluster.ask("squeue", "-h", "-t", "R", "-o", "%P"), "preemption", 60)

    with Meanwhile(says(work, "saved step 5"), urgent, cluster.hasten):
        result, _ = run({**LONG, "steps": 60}, slurm={"partition": "main"}, stall_timeout_s=5.0)
    assert result.success, failure_message(result)
    first, second = starts(work)
    assert first == 0
    assert second > 5


def test_a_job_that_waits_for_its_turn_is_no_job_that_hangs(run, work, cluster) -> None:
    other = cluster.ask("sbatch", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 8", "--parsable")
    assert other.strip().isdigit()
    result, _ = run({"steps": 5}, stall_timeout_s=3.0)
    assert result.success, failure_message(result)
    cluster.wait_idle()
    other = cluster.ask("sbatch", "-N2", "--exclusive", "-o", "/dev/null", "--wrap", "sleep 60", "--parsable")
    result, _ = run({"steps": 6}, lease_wait_s=2.0, fingerprint="a" * 64, resume=False)
    assert "longer than lease_wait_s = 2" in failure_message(result)
    assert cluster.jobs() == [other.strip()]
    cluster.ask("scancel", other.strip())


def test_one_that_hangs_is_ended(run, work) -> None:
    result, _ = run({"steps": 50, "step_s": 0.05, "hang_at": 10}, stall_timeout_s=3.0, grace_s=2.0)
    assert "no heartbeat for" in failure_message(result)
    assert not (work / RECORD_NAME).exists()


def test_one_that_somebody_cancels_is_no_success_and_no_riddle(run, work, cluster) -> None:
    with Meanwhile(says(work, "saved step 5"), lambda: cluster.ask("scancel", job_of(work))):
        result, _ = run(LONG)
    assert "somebody cancelled it with `scancel`" in failure_message(result)


def test_a_controller_that_is_away_for_a_while_changes_nothing(run, work, cluster) -> None:
    def away() -> None:
        cluster.stop_controller()
        time.sleep(3.0)
        cluster.start_controller()

    with Meanwhile(says(work, "saved step 5"), away):
        result, _ = run({**LONG, "steps": 60})
    assert result.success, failure_message(result)
    assert starts(work) == [0]


def test_two_ranks_on_two_machines_train_the_bytes_that_two_ranks_here_do(cluster, work, tmp_path) -> None:
    from tests.trainer.train.train_jobs import make_job, tiny_recipe, write_conversations

    data = write_conversations(tmp_path / "data", rows=24, valid=8)
    weights = {}
    for name, launcher in {"slurm": slurm, "local": local}.items():
        job = make_job(tmp_path / name, data, recipe=tiny_recipe(steps=3), nproc=2, dp=2, launcher=name)
        place = Path(job.work_dir)
        place.mkdir(parents=True)
        (place / "job.json").write_text(job.model_dump_json(by_alias=True))
        launch = Launch(
            command="train",
            experiment="smoke",
            asset="vpmoe_stage1",
            work_dir=place,
            sources=ROOT,
            device="cpu",
            nproc=2,
            environment={**os.environ, "PYTHONPATH": str(ROOT)},
            marker=new_marker(),
            grace_s=30.0,
            wait_s=60.0,
            settings={**SHORT, "nodes": 2} if name == "slurm" else {},
        )
        with launcher.reserve(launch, print) as handle:
            handle.start()
            wait_until(lambda handle=handle: handle.poll() is not None, name, 170)
            code = handle.poll()
            handle.stop(grace_s=1.0, log=print)
        assert code == 0, (place / "console.txt").read_text()
        weights[name] = files_below(Path(job.output_dir) / "payload")
        if name == "slurm":
            assert re.search(r"#SBATCH --nodes=2\n", (place / ".slurm" / "batch.sh").read_text())
    assert any(path.endswith(".safetensors") for path in weights["local"])
    assert weights["slurm"] == weights["local"]


def test_two_machines_share_a_job_and_one_that_is_lost_is_waited_for(run, work, cluster) -> None:
    def lose() -> None:
        cluster.lose_node("n1")
        wait_until(lambda: not cluster.ask("squeue", "-h", "-t", "R", "-o", "%A").strip(), "a lost job", 120)
        cluster.start_node("n1")
        cluster.hasten()

    with Meanwhile(says(work, "saved step 5"), lose):
        result, trained = run(WATCHED, slurm={"nodes": 2}, nproc=2, dp=2, grace_s=10.0, stall_timeout_s=60.0)
    assert result.success, failure_message(result)
    log = (work / "log.txt").read_text()
    assert log.count("rank 1 starts") == 2
    first, second = starts(work)
    assert first == 0
    assert second >= 5
    assert trained.summary["steps"] == 120
