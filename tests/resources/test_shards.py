"""Which engine runs shards: found by its word, refused at once where it cannot; that needs no Ray."""

import importlib.util
import pickle
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Pipe
from pathlib import Path

import pytest

from tests.services.cluster import free_ports
from vpmoe_assets.errors import DataError
from vpmoe_assets.project import ROOT
from vpmoe_assets.resources.launcher import Launch, LaunchError
from vpmoe_assets.resources.launchers import ray as ray_launcher
from vpmoe_assets.resources.ray import shards
from vpmoe_assets.resources.ray.cluster import ClusterError
from vpmoe_assets.resources.ray.settings import DEFAULT_ADDRESS, RaySettings, ray_settings
from vpmoe_assets.resources.ray.shards import Work
from vpmoe_assets.resources.shards import ShardsResource, available
from vpmoe_assets.resources.trainer import TrainerResource


@pytest.fixture(autouse=True)
def nothing_set(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RAY_ADDRESS", "VPMOE_LAUNCHERS"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if Ray were; nothing here imports it."""
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())


def never(shard: int, report: Callable[[int], None]) -> None:
    """A worker that no driver may get to."""
    raise AssertionError(shard)


def refusal(tmp_path: Path, **settings) -> str:
    with pytest.raises(DataError) as refused:
        ShardsResource(**settings).open(tmp_path, print)
    return str(refused.value)


def test_processes_of_this_machine_are_the_engine_unless_another_is_named(tmp_path) -> None:
    shards, trainer = ShardsResource(), TrainerResource(launcher="slurm", score_workers=3)
    assert available() == ["processes", "ray"]
    assert shards.open(tmp_path, print) is None
    assert shards.trainer(trainer) is trainer


def test_shares_of_scores_are_started_where_shards_are(tmp_path) -> None:
    trainer = TrainerResource(launcher="slurm", score_workers=3, device="cuda")
    changed = ShardsResource(engine="ray", engine_settings={"cpus": 2.0}).trainer(trainer)
    assert (changed.launcher, changed.launcher_settings) == ("ray", {"cpus": 2.0})
    assert (changed.score_workers, changed.device) == (3, "cuda")


def test_what_cannot_run_is_refused_with_key_value_and_remedy(tmp_path, monkeypatch) -> None:
    assert 'engine = "spark" was asked for; available: "processes", "ray"' in refusal(
        tmp_path, engine="spark"
    )
    said = refusal(tmp_path, engine_settings={"cpus": 2})
    assert "engine_settings = {'cpus': 2}" in said
    assert "VPMOE_WORKERS says how many" in said
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    said = refusal(tmp_path, engine="ray")
    assert said.startswith('engine = "ray": ')
    assert "the package ray is not installed: `make ray` adds it" in said


@pytest.mark.usefixtures("installed")
@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"adress": "a:1"}, "'address'"),
        ({"address": "ray://head:10001"}, "give HOST:PORT"),
        ({"address": "head"}, "give HOST:PORT"),
        ({"address": "user:secret@head:1"}, "give HOST:PORT"),
        ({"cpus": 0}, "cpus"),
        ({"retries": -1}, "retries"),
    ],
)
def test_wrong_settings_are_refused(tmp_path, settings, said) -> None:
    assert said in refusal(tmp_path, engine="ray", engine_settings=settings)


@pytest.mark.usefixtures("installed")
def test_the_address_is_the_runs_the_files_the_environments_or_loopback(tmp_path) -> None:
    file = tmp_path / "launchers.toml"
    file.write_text('[launcher.ray]\naddress = "file:1"\nretries = 1\n')
    both = {"VPMOE_LAUNCHERS": str(file), "RAY_ADDRESS": "environment:2"}
    assert ray_settings({"address": "run:3"}, both) == RaySettings(address="run:3", retries=1)
    assert ray_settings({}, both).address == "file:1"
    assert ray_settings({}, {"RAY_ADDRESS": "environment:2"}).address == "environment:2"
    assert ray_settings({}, {}).address == DEFAULT_ADDRESS


@pytest.mark.usefixtures("installed")
def test_an_address_at_which_nobody_listens_is_refused_at_once(tmp_path) -> None:
    address = f"127.0.0.1:{free_ports(1)[0]}"
    said = refusal(tmp_path, engine="ray", engine_settings={"address": address})
    assert f"no Ray cluster answers at {address}" in said
    assert "ray start --head" in said
    with pytest.raises(LaunchError, match="no Ray cluster answers"):
        reserved(tmp_path, nproc=1, address=address)
    with pytest.raises(LaunchError, match=r"jobs of one rank, and nproc = 2"):
        reserved(tmp_path, nproc=2, address=address)


def reserved(work_dir: Path, *, nproc: int, address: str) -> None:
    launch = Launch(
        command="score",
        experiment="tiny",
        asset="teacher_topk",
        work_dir=work_dir,
        sources=work_dir,
        device="cpu",
        nproc=nproc,
        environment={},
        marker="m",
        grace_s=1.0,
        wait_s=1.0,
        settings={"address": address},
    )
    with ray_launcher.reserve(launch, print):
        pass


def test_what_a_driver_fails_at_arrives_though_its_log_is_on_a_full_disk(tmp_path) -> None:
    settings = RaySettings(address=f"127.0.0.1:{free_ports(1)[0]}")
    ours, theirs = Pipe()
    with ours, Path("/dev/full").open("wb") as full:
        with theirs:
            driver = subprocess.Popen(
                [sys.executable, "-m", shards.__name__, str(theirs.fileno())],
                stdin=subprocess.PIPE,
                stdout=full,
                stderr=full,
                pass_fds=[theirs.fileno()],
                cwd=ROOT,
            )
        ours.send_bytes(pickle.dumps(Work(never, 1, tmp_path, settings)))
        kind, error = ours.recv()
        assert kind == "failed"
        assert isinstance(error, ClusterError)
        assert "no Ray cluster answers at" in str(error)
        driver.communicate(timeout=60)
