"""Servers, each started by the first test that needs it and ended after the last."""

import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.resources.conftest import leases_of_its_own, run_stand_in, test_id  # noqa: F401 - fixtures
from tests.services import debian
from tests.services.cluster import Cluster, lines_of


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
