"""Servers, each started by the first test that needs it and ended after the last."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.resources.conftest import leases_of_its_own, run_stand_in, test_id  # noqa: F401 - fixtures
from tests.resources.launched import ROOT
from tests.services import debian
from tests.services.cluster import Cluster, lines_of
from tests.services.postgres import Postgres
from tests.services.shared import MOUNTS_ENV, SharedDirectory


def require(*packages: str) -> None:
    """Skip, out loud, where a package is not there."""
    if lacking := set(packages) & set(debian.missing()):
        pytest.skip(f"not installed: {', '.join(sorted(lacking))}; `make test-services` installs it")


@pytest.fixture(scope="session")
def running_cluster() -> Iterator[Cluster]:
    require("slurm-wlm", "munge")
    if os.geteuid() != 0:
        pytest.skip("the servers of Slurm are started by root alone")
    # A short path: sockets have a hundred characters.
    with tempfile.TemporaryDirectory(prefix="vpmoe-slurm-") as place:
        started = Cluster(Path(place))
        try:
            started.start()
            yield started
        finally:
            started.stop()
        assert not started.left()


@pytest.fixture
def cluster(
    running_cluster: Cluster, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> Iterator[Cluster]:
    """Two idle machines, for this process and what it starts; afterwards nothing is left on them."""
    running_cluster.ask("scontrol", "update", "nodename=n[0-1]", "state=resume")  # what a test has lost
    running_cluster.wait_idle()
    for name, value in running_cluster.environment.items():
        monkeypatch.setenv(name, value)
    try:
        yield running_cluster
    except BaseException:
        print(lines_of(sorted(running_cluster.place.glob("*.log"))))
        raise
    for job in running_cluster.jobs():
        running_cluster.ask("scancel", job)
    running_cluster.wait_idle()


@pytest.fixture(scope="session")
def running_postgres() -> Iterator[Postgres]:
    require("postgresql")
    with tempfile.TemporaryDirectory(prefix="vpmoe-postgres-") as place:
        server = Postgres(Path(place))
        server.make()
        server.start()
        try:
            yield server
        finally:
            server.stop()


@pytest.fixture
def team(
    running_postgres: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> tuple[Path, Postgres]:
    """A home of Dagster's as `deploy/team` has it, empty, and its server, which is up again afterwards."""
    home = tmp_path / "dagster"
    home.mkdir()
    shutil.copyfile(ROOT / "deploy" / "team" / "dagster.yaml", home / "dagster.yaml")
    settings = {**running_postgres.environment, "VPMOE_DAGSTER_FILES": str(home / "files")}
    for name, value in {**settings, "DAGSTER_HOME": str(home)}.items():
        monkeypatch.setenv(name, value)
    return home, running_postgres


def mounted(place: Path, *, locks: bool = True) -> Iterator[tuple[Path, Path]]:
    """A directory as each of two machines has it."""
    require("bindfs")
    if not os.access("/dev/fuse", os.R_OK | os.W_OK):
        pytest.skip("this machine has no /dev/fuse: nothing can be mounted by a test")
    shared = SharedDirectory(place, locks=locks)
    if wrong := shared.mount():
        if "not permitted" in wrong:
            pytest.skip(f"nothing can be mounted here: {wrong}")
        pytest.fail(wrong)
    try:
        yield shared.machines
    finally:
        shared.unmount()


@pytest.fixture
def machines(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """An empty directory as each of two machines has it."""
    if given := os.environ.get(MOUNTS_ENV):
        name = tmp_path.name
        first, second = (Path(mount) / name for mount in given.split(":"))
        first.mkdir()
        yield first, second
        shutil.rmtree(first)
    else:
        yield from mounted(tmp_path)


@pytest.fixture
def without_locks(tmp_path: Path) -> Iterator[tuple[Path, Path]]:
    """The same, where a lock is known to one machine alone."""
    yield from mounted(tmp_path, locks=False)
