"""What is asked of Slurm, and what its answers mean; `tests/services/test_slurm.py` asks a real one."""

import os
import re
import subprocess
import time
from pathlib import Path

import pytest

from trainer.contract.schema.base import ConfigError
from trainer.contract.status import HEARTBEAT_NAME, STATUS_NAME
from vpmoe_assets.resources.detached import DetachedJob
from vpmoe_assets.resources.launcher import Launch, LaunchError
from vpmoe_assets.resources.launcher_settings import settings_of
from vpmoe_assets.resources.launchers import slurm
from vpmoe_assets.resources.launchers.slurm import JobLostError, SlurmHandle
from vpmoe_assets.resources.process_record import Orchestrator
from vpmoe_assets.resources.slurm import batch
from vpmoe_assets.resources.slurm.cluster import Cluster, ClusterSilentError, SlurmMissingError
from vpmoe_assets.resources.slurm.settings import Layout, SlurmSettings, seconds

ROOT = Path(__file__).resolve().parents[2]


def launch(work: Path, *, nproc: int = 1, device: str = "cpu", **settings: object) -> Launch:
    return Launch(
        command="train",
        experiment="smoke",
        asset="vpmoe_stage1",
        work_dir=work,
        sources=ROOT,
        device=device,
        nproc=nproc,
        environment={
            "PATH": os.environ["PATH"],
            "SLURM_CONF": "/etc/x",
            "SLURM_JOB_ID": "5",
            "SBATCH_QOS": "q",
        },
        marker="0123456789abcdef",
        grace_s=600.0,
        wait_s=0.0,
        settings=settings,
    )


@pytest.fixture
def commands(tmp_path, monkeypatch):
    """Puts commands of Slurm into PATH that answer as they are told: ``commands(scontrol="echo hello")``."""
    place = tmp_path / "bin"
    place.mkdir()

    def answer(**told: str) -> Cluster:
        for name in ("sbatch", "squeue", "scontrol", "scancel", "srun"):
            (place / name).write_text(f"#!/bin/bash\n{told.get(name, 'exit 0')}\n")
            (place / name).chmod(0o700)
        return Cluster({"PATH": f"{place}:{os.environ['PATH']}", "SLURM_CONF": "/etc/x", "SLURM_JOB_ID": "5"})

    return answer


@pytest.mark.parametrize(
    ("limit", "expected"),
    [  # the forms of `man sbatch`
        ("30", 1800),
        ("30:15", 1815),
        ("12:00:00", 43200),
        ("2-00", 172800),
        ("1-02:30", 95400),
        ("1-02:30:05", 95405),
    ],
)
def test_a_time_limit_means_what_slurm_means_by_it(limit, expected):
    assert seconds(limit) == expected


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"partitoin": "gpu"}, "nearest valid key is 'partition'"),
        ({"time": "soon"}, 'time = "soon" is no time limit of Slurm'),
        ({"time": "5", "notice_s": 120}, "less than three times notice_s = 120"),
        ({"directives": ["--nodes=3"]}, "--nodes is decided by the launcher"),
        ({"directives": ["-p gpu"]}, "-p has a key of its own, partition"),
        ({"directives": ["exclusive"]}, "is no option of sbatch"),
        ({"directives": ["--comment=x\n#SBATCH --nodes=3"]}, "is no option of sbatch"),
        ({"partition": "a b"}, "partition"),
        ({"account": "--wrap=x"}, "account"),
        ({"on_restart": "ignore"}, "on_restart"),
        ({"restarts": -1}, "restarts"),
    ],
)
def test_settings_that_cannot_be_followed_are_refused_with_their_key(tmp_path, keys, message):
    with pytest.raises(LaunchError, match=re.escape(message)), slurm.reserve(launch(tmp_path, **keys), print):
        pytest.fail("it was taken")


def test_a_file_says_what_a_site_needs_and_a_run_what_it_needs_otherwise(tmp_path):
    path = tmp_path / "site.toml"
    path.write_text('[launcher.slurm]\npartition = "gpu"\nnodes = 4\n')
    found = settings_of("slurm", SlurmSettings, {"nodes": 2}, {"VPMOE_LAUNCHERS": str(path)})
    assert (found.partition, found.nodes, found.restarts) == ("gpu", 2, 3)
    for text, message in {
        '[slurm]\npartition = "gpu"': r"holds tables \[launcher.<name>\] and nothing else",
        '[launcher]\nslurm = "gpu"': "launcher.slurm is no table",
        "[launcher.slurm": str(path),
        "[launcher.slurm]\npartition = 7": r"site.toml, \[launcher.slurm\]: partition",
    }.items():
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            settings_of("slurm", SlurmSettings, {}, {"VPMOE_LAUNCHERS": str(path)})
    with pytest.raises(ConfigError, match="there is no such file"):
        settings_of("slurm", SlurmSettings, {}, {"VPMOE_LAUNCHERS": str(tmp_path / "none.toml")})
    assert settings_of("slurm", SlurmSettings, {}, {}) == SlurmSettings()


def test_ranks_are_spread_evenly_over_as_few_machines_as_hold_them():
    assert SlurmSettings().layout(1, "cuda") == Layout(1, 1)
    assert SlurmSettings().layout(16, "cuda") == Layout(2, 8)
    assert SlurmSettings().layout(16, "cpu") == Layout(1, 16)
    assert SlurmSettings(nodes=2).layout(16, "cpu") == Layout(2, 8)
    assert SlurmSettings(nodes=4).layout(1, "cuda") == Layout(1, 1)
    with pytest.raises(ValueError, match="cannot be spread evenly over 3 nodes"):
        SlurmSettings(nodes=3).layout(16, "cuda")
    with pytest.raises(ValueError, match="gpus_per_node = 8; raise nodes"):
        SlurmSettings(nodes=1).layout(16, "cuda")


def test_the_script_asks_for_what_the_job_needs_and_bash_reads_it_whatever_its_paths(tmp_path):
    work = tmp_path / "a work's $(touch x) `area` 100%"
    work.mkdir()
    settings = SlurmSettings(
        partition="gpu", time="12:00:00", cpus_per_rank=4, gres="gpu:h100", directives=("--exclusive",)
    )
    start = launch(work, nproc=16, device="cuda")
    script = batch.write(start, "vpmoe-x", settings, settings.layout(16, "cuda"), 3)
    subprocess.run(["bash", "-n", str(script)], check=True)
    asked = re.findall(r"^#SBATCH (.*)$", script.read_text(), re.M)
    for option in (
        *("--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=32", "--gres=gpu:h100:8"),
        *("--partition=gpu", "--time=12:00:00", "--requeue", "--signal=INT@120", "--exclusive"),
        *("--job-name=vpmoe-x", "--open-mode=append"),
    ):
        assert option in asked
    assert f'--output="{work}/console.txt"'.replace("100%", "100%%") in asked
    (line,) = [line for line in script.read_text().splitlines() if line.startswith("srun")]
    assert "--wait=630" in line
    assert "--ranks 8" in line
    assert "WANDB" not in script.read_text()


def test_what_a_job_said_last_is_read_whole_or_not_at_all(tmp_path):
    place = tmp_path / batch.PLACE
    assert (batch.ended(tmp_path), batch.began(tmp_path), batch.devices(tmp_path)) == (None, None, ())
    place.mkdir()
    (place / batch.EXIT).write_text("17 2")
    assert batch.ended(tmp_path) is None
    (place / batch.EXIT).write_text("17 2 75\n")
    assert batch.ended(tmp_path) == batch.Ended("17", 2, 75)
    for number, name in {10: "third", 2: "second\nsecond", 0: "first"}.items():
        (place / f"devices.{number}").write_text(f"{name}\n")
    assert batch.devices(tmp_path) == ("first", "second", "second", "third")
    (place / batch.STARTED).write_text("17 2")
    assert batch.began(tmp_path) is None
    (place / batch.STARTED).write_text("17 2 n1\n")
    assert batch.began(tmp_path) == batch.Began("17", 2, "n1")
    batch.write(launch(tmp_path), "vpmoe-x", SlurmSettings(), Layout(1, 1), 3)
    assert (batch.ended(tmp_path), batch.devices(tmp_path)) == (None, ())


@pytest.mark.parametrize(
    ("word", "waits", "over"),
    [
        ("PENDING", True, False),
        ("RUNNING", False, False),
        ("COMPLETING", True, False),
        ("SUSPENDED", True, False),
        ("NODE_FAIL", False, True),
        ("SOMETHING_NEW", False, True),
    ],
)
def test_a_state_says_whether_a_job_waits_and_whether_it_is_over(commands, word, waits, over):
    text = f"JobId=17 JobName=x JobState={word} Reason=None Restarts=2 NodeList=n[0-1] Comment=JobState=NO"
    found = commands(scontrol=f"echo '{text}'").state("17")
    assert found is not None
    assert (found.word, found.restarts, found.nodes, found.waits, found.over) == (
        word,
        2,
        "n[0-1]",
        waits,
        over,
    )


def test_a_job_that_nobody_knows_is_told_from_a_cluster_that_does_not_answer(commands):
    unknown = 'echo "slurm_load_jobs error: Invalid job id specified" >&2; exit 1'
    assert commands(scontrol=unknown).state("17") is None
    silent = 'echo "Unable to contact slurm controller (connect failure)" >&2; exit 1'
    cluster = commands(scontrol=silent, squeue=silent, scancel=silent)
    for question in (lambda: cluster.state("17"), lambda: cluster.find("x"), lambda: cluster.cancel("17")):
        with pytest.raises(ClusterSilentError, match="Unable to contact slurm controller"):
            question()
    over = 'echo "scancel: error: Kill job error on job id 17: Job/step already completing" >&2; exit 1'
    commands(scancel=over).cancel("17")


def test_nothing_of_the_allocation_that_the_orchestrator_runs_in_reaches_the_job(commands):
    assert commands().environment["SLURM_CONF"] == "/etc/x"
    assert "SLURM_JOB_ID" not in commands().environment


def test_a_machine_without_slurm_is_told_so(tmp_path):
    with pytest.raises(SlurmMissingError, match="no sbatch, squeue, scontrol, scancel, srun in PATH"):
        Cluster({"PATH": str(tmp_path)})


@pytest.fixture
def followed(tmp_path, commands, monkeypatch):
    """Returns what follows a job, 17, that has begun once, and of which the cluster has a last word."""
    monkeypatch.setattr(slurm, "_FILES_S", 0.0)

    def follow(word: str, restarts: int, log: list[str]) -> SlurmHandle:
        answers = commands(
            scontrol=f"echo 'JobId=17 JobState={word} Reason=None Restarts={restarts} NodeList=n0'",
            sbatch="echo 18",
        )
        handle = SlurmHandle(launch(tmp_path), SlurmSettings(), Layout(1, 1), answers, log.append)
        handle.job = DetachedJob(
            launcher="slurm",
            name="vpmoe-x-0",
            job_id="17",
            asset="vpmoe_stage1",
            nproc=1,
            nodes=1,
            device="cpu",
            orchestrator=Orchestrator.this(),
            dagster_run_id=None,
        )
        (tmp_path / batch.PLACE).mkdir()
        (tmp_path / batch.PLACE / batch.STARTED).write_text("17 0 n0\n")
        (tmp_path / STATUS_NAME).write_text("interrupted\n")
        return handle

    return follow


@pytest.mark.parametrize("word", ["COMPLETED", "FAILED"])
def test_a_job_that_was_queued_again_and_never_began_is_handed_over_once_more(followed, tmp_path, word):
    """A machine that has just ended it may refuse it ("Job credential revoked"): COMPLETED, Slurm says."""
    log: list[str] = []
    handle = followed(word, restarts=1, log=log)
    assert handle.poll() is None
    assert (handle.job.job_id, handle.job.restarts) == ("18", 1)
    assert f"job 17 of Slurm ended as {word} before it began again; it is handed over again" in log[0]
    assert not (tmp_path / batch.PLACE / batch.STARTED).exists()


def test_one_that_began_and_ended_without_a_word_has_failed(followed):
    assert followed("FAILED", restarts=0, log=[]).poll() == 1


def test_one_that_another_cluster_has_begun_is_not_begun_twice(followed):
    with pytest.raises(
        JobLostError, match="ended as REVOKED: another cluster of the federation has begun it"
    ):
        followed("REVOKED", restarts=0, log=[]).poll()


@pytest.mark.parametrize("ahead_s", [-86_400.0, 86_400.0])
def test_a_job_that_nobody_knows_is_alive_by_the_clock_of_its_files(tmp_path, commands, monkeypatch, ahead_s):
    """Handed over once more because this machine's clock is wrong, it would run twice in one directory."""
    handle = SlurmHandle(launch(tmp_path), SlurmSettings(), Layout(1, 1), commands(), print)
    assert not handle._beats()
    (tmp_path / HEARTBEAT_NAME).write_text("")
    now = time.time()
    monkeypatch.setattr("time.time", lambda: now + ahead_s)
    assert handle._beats()
    os.utime(tmp_path / HEARTBEAT_NAME, (now - 300, now - 300))
    assert not handle._beats()
