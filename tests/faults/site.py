"""Where the experiment is made: a store and an instance of its own, programs forked from a warm server."""

import contextlib
import functools
import json
import os
import shutil
import subprocess
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import psutil

from tests.assets.graphs import ROOT
from tests.faults.disturb import Disturber
from tests.faults.experiment import NAME, ORDER, SHORT, write
from tests.faults.mounts import let_go
from tests.faults.teacher import URL_ENV, Oracle
from tests.forks import Forked, Forks
from tests.resources.launched import TEST_ENV, bare_environment
from vpmoe_assets.lineage.store import Store

TRAINER = {"wandb": "disabled", "poll_s": 0.1, "grace_s": 30.0}
"""Settings of the trainer's resource."""
PATIENCE_S = 240.0


@dataclass
class Site:
    """A store and an instance.

    Attributes:
        root: Of both.
        lab: What it is made with.
        run: How many programs were started in it.
    """

    root: Path
    lab: "Lab"
    runs: int = 0

    @property
    def store(self) -> Store:
        return Store(self.root / "artifacts")

    @property
    def environment(self) -> dict[str, str]:
        """Of a shell in its root."""
        return {
            **bare_environment(),
            **self.lab.disturber.environment,
            TEST_ENV: self.lab.id,
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "DAGSTER_HOME": str(self.root),
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "VPMOE_ARTIFACTS": str(self.root / "artifacts"),
            "VPMOE_EXPERIMENT": str(self.lab.experiment),
            "VPMOE_LEASE_DIR": str(self.root / "leases"),
            "VPMOE_WORKERS": "2",
            URL_ENV: self.lab.oracle.url,
        }

    def materialize(self, *assets: str, **settings: Any) -> "Program":
        """Start to make assets with Dagster's own command."""
        selection = ",".join(f'key:"{NAME}/{asset}"' for asset in assets)
        config = {"resources": {"trainer": {"config": {**TRAINER, **settings}}}}
        command = ["asset", "materialize", "-m", "vpmoe_assets.definitions", "--select", selection]
        return self.start("dagster", *command, "--config-json", json.dumps(config))

    def vpmoe(self, *arguments: str) -> "Program":
        """Start a verb."""
        return self.start("vpmoe_assets.cli", *arguments)

    def start(self, module: str, *arguments: str, **environment: str) -> "Program":
        """Start a program."""
        self.runs += 1
        output = self.lab.directory / "output" / f"{self.root.name}-{self.runs}.txt"
        output.parent.mkdir(exist_ok=True)
        with output.open("w") as file, output.with_suffix(".err").open("w") as errors:
            forked = self.lab.forks.start(
                ["-m", module, *arguments],
                environment={**self.environment, **environment},
                directory=self.root,
                output=file,
                errors=errors,
            )
        return Program(forked, output, time.monotonic())

    def digests(self) -> dict[str, str]:
        """Return the content digest of the latest version of every asset that there is."""
        found = {asset: self.store.find(NAME, asset) for asset in self.store.assets(NAME)}
        return {asset: record.digest for asset, record in found.items() if record is not None}

    def copy(self, target: Path) -> "Site":
        """Copy it as it is: files that are never written to again become links."""
        shutil.copytree(self.root, target, symlinks=True, copy_function=_linked)
        return Site(target, self.lab)

    @contextlib.contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with contextlib.chdir(self.root), dg.DagsterInstance.from_config(str(self.root)) as instance:
            yield instance

    def remove(self) -> None:
        let_go(self.root)
        shutil.rmtree(self.root)


def _linked(source: str, target: str) -> None:
    if os.stat(source).st_mode & 0o222:
        shutil.copy2(source, target)
    else:
        os.link(source, target)


@dataclass
class Program:
    """A program that was started, and what it prints."""

    forked: Forked
    output: Path
    begun: float = field(default=0.0)

    @property
    def pid(self) -> int:
        return self.forked.pid

    def poll(self) -> int | None:
        return self.forked.poll()

    def wait(self, seconds: float = PATIENCE_S) -> int:
        return self.forked.wait(seconds)

    def within(self, seconds: float) -> int | None:
        """Wait that long; its exit code, None where it still runs then."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            return self.forked.wait(max(seconds, 0.0))
        return None

    def said(self) -> str:
        return self.output.read_text(errors="replace") + self.output.with_suffix(".err").read_text(
            errors="replace"
        )


@dataclass
class Lab:
    """What all sites share.

    Attributes:
        directory: Where everything is.
        id: Carried by every process.
        forks: Starts programs.
        disturber: Makes writes fail and clocks wrong.
        oracle: The teacher.
        short: Whether it is the short experiment.
        pace: How much longer than undisturbed everything takes of late, on a machine that has other work too.
    """

    directory: Path
    id: str
    forks: Forks
    disturber: Disturber
    oracle: Oracle
    short: bool = False
    pace: float = 1.0

    @property
    def order(self) -> tuple[str, ...]:
        """What is made, in an order in which it can be made."""
        return SHORT if self.short else ORDER

    @property
    def experiment(self) -> Path:
        return self.directory / "faults.toml"

    @property
    def made(self) -> Path:
        """Facts of the undisturbed run: seconds and digest of each asset."""
        return self.directory / "made.json"

    def before(self, asset: str) -> Site:
        """Return the site as it was before an asset was made; not to be written to."""
        return Site(self.directory / "base" / asset, self)

    def prepare(self, say: Any = print) -> Mapping[str, Any]:
        """Make everything undisturbed, once, and keep the state before each asset.

        Returns:
            `seconds` and `digests` by asset.
        """
        if not self.made.exists():
            write(self.experiment, short=self.short)
            site = self.before(self.order[0])
            shutil.rmtree(site.root.parent, ignore_errors=True)
            site.root.mkdir(parents=True)
            shutil.copy(ROOT / "dagster.yaml", site.root)
            self.made.write_text(json.dumps({"seconds": {}, "digests": {}}))
        facts: dict[str, Any] = json.loads(self.made.read_text())
        for asset, following in zip(self.order, [*self.order[1:], "finished"], strict=True):
            if asset in facts["seconds"]:
                continue
            shutil.rmtree(self.before(following).root, ignore_errors=True)
            site = self.before(asset).copy(self.before(following).root)
            program = site.materialize(asset)
            assert program.wait() == 0, f"{asset}: {program.said()[-4000:]}"
            facts["seconds"][asset] = round(time.monotonic() - program.begun, 2)
            facts["digests"] = site.digests()
            self.made.write_text(json.dumps(facts, indent=1))
            say(f"{asset}: {facts['seconds'][asset]} s")
        return facts

    def programs(self, *names: str) -> list[psutil.Process]:
        """Return what was forked and still runs; of programs of some names where those are given."""
        found = []
        for process in psutil.Process(self.forks.server).children(recursive=True):
            with contextlib.suppress(psutil.Error):
                # The server keeps a process for each program, which has the server's own name.
                program = process.name() != self._server_name and process.status() != psutil.STATUS_ZOMBIE
                if program and (not names or process.name() in names):
                    found.append(process)
        return found

    @functools.cached_property
    def _server_name(self) -> str:
        return psutil.Process(self.forks.server).name()


@contextlib.contextmanager
def open_lab(directory: Path, oracle: Oracle, *, short: bool = False) -> Iterator[Lab]:
    """Open the lab in a directory; what was made undisturbed there is used again."""
    directory.mkdir(parents=True, exist_ok=True)
    for site in directory.glob("fault-*"):  # of a sitting that was killed
        let_go(site)
    disturber = Disturber(directory)
    marker = directory / "id"
    if not marker.exists():
        marker.write_text(os.urandom(16).hex())
    before = dict(os.environ)
    os.environ.update(disturber.environment)  # the server loads it, and with it all that it forks
    try:
        forks = Forks.warm(directory)
    finally:
        os.environ.clear()
        os.environ.update(before)
    try:
        yield Lab(directory, marker.read_text(), forks, disturber, oracle, short)
    finally:
        forks.close()
