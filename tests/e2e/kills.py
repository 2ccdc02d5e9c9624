"""SIGKILL at random moments: `python -m tests.e2e.kills data|stage1|stage3 TRIALS [SEED]` prints a line each.

A trial starts from a fresh store, materialises with Dagster's own command in a process of its own, kills one
of the processes that take part (the orchestrator, a rank, a worker), and materialises again until it is
done: by turns after `vpmoe reap`, in a shell that knows nothing of Dagster's instance, and without it. What
was published has to be the same bytes as without a kill, and nothing may be left: no process, no open run,
no slot, lease or lock. (`stage3` is about the trainer alone, see `tests.e2e.kills_on_policy`.)
"""

import contextlib
import random
import re
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import psutil

from tests.assets.graphs import DATA, ROOT, write_experiment
from tests.e2e.kills_on_policy import on_policy
from tests.resources.launched import TEST_ENV, bare_environment, carrying
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources.leases import Gpu, lease
from vpmoe_assets.resources.process_record import RECORD_NAME
from vpmoe_assets.resources.run_record import paths

BIN = Path(sys.executable).parent
PATHS = {"data": DATA, "stage1": ("vpmoe_stage1",)}
MAKES = re.compile(r"-m (trainer|vpmoe_assets\.harmony\.pool) ")  # and not what copies Dagster's logs
SHORT = {
    "[stages.vpmoe_stage1]\nsteps = 8": '[stages.vpmoe_stage1]\nsteps = 6\ninit = "fresh"',
    "global_batch_size = 2": "global_batch_size = 1",
    "save_interval = 5": "save_interval = 2",
    "seq_len = 1024": "seq_len = 512",
    "eval_interval = 5": "eval_interval = 10",
}
TRIES = 4
PATIENCE_S = 900.0


@dataclass
class Site:
    """A project root in miniature: Dagster's home, the store, the leases."""

    root: Path
    id: str = field(default_factory=lambda: uuid.uuid4().hex)

    def __post_init__(self) -> None:
        self.root.mkdir(exist_ok=True)
        shutil.copy(ROOT / "dagster.yaml", self.root)
        write_experiment(self.root / "tiny.toml", SHORT)
        self.output = self.root / "output.txt"

    @property
    def store(self) -> Store:
        return Store(self.root / "artifacts")

    @property
    def environment(self) -> dict[str, str]:
        """Of a shell that knows the store and not Dagster's instance."""
        return {
            **bare_environment(),
            TEST_ENV: self.id,
            "DAGSTER_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(ROOT),
            "VPMOE_ARTIFACTS": str(self.store.root),
            "VPMOE_EXPERIMENT": str(self.root / "tiny.toml"),
            "VPMOE_LEASE_DIR": str(self.root / "leases"),
            "VPMOE_WORKERS": "2",
        }

    def materialize(self, assets: tuple[str, ...]) -> subprocess.Popen[bytes]:
        selection = ",".join(f"tiny/{asset}" for asset in assets)
        command = [BIN / "dagster", "asset", "materialize", "-m", "vpmoe_assets.definitions"]
        with self.output.open("ab") as output:
            return subprocess.Popen(
                [*command, "--select", selection],
                cwd=self.root,
                env={**self.environment, "DAGSTER_HOME": str(self.root)},
                stdout=output,
                stderr=output,
            )

    def reap(self) -> str:
        """What `vpmoe reap` says, run from another directory."""
        done = subprocess.run(
            [BIN / "vpmoe", "reap"],
            cwd=self.root.parent,
            env=self.environment,
            capture_output=True,
            text=True,
            check=True,
            timeout=PATIENCE_S,
        )
        return done.stdout.strip().replace("\n", " | ")

    def digests(self, assets: tuple[str, ...]) -> dict[str, str | None]:
        latest = {asset: self.store.find("tiny", asset) for asset in assets}
        return {asset: record and record.digest for asset, record in latest.items()}

    @contextlib.contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with contextlib.chdir(self.root), dg.DagsterInstance.from_config(str(self.root)) as instance:
            yield instance

    def left(self) -> list[str]:
        """Name everything that a finished site may not hold any more."""
        found = [f"process {process.pid}: {process.cmdline()}" for process in carrying(self.id)]
        work = self.store.root / ".work"
        found += [str(path) for path in work.rglob(RECORD_NAME)]
        found += [str(path) for path in paths(self.store.root)]
        found += [str(path) for path in work.glob("tiny/[!.]*")]
        with self.instance() as instance:
            for run in instance.get_runs():
                # A run that was killed before our code was reached (a tenth of a second) holds nothing.
                if not run.is_finished and instance.get_run_step_stats(run.run_id):
                    found.append(f"run {run.run_id} is {run.status}")
            for pool in instance.event_log_storage.get_concurrency_keys():
                info = instance.event_log_storage.get_concurrency_info(pool)
                if info.active_slot_count or info.pending_step_count:
                    found.append(f"slot of pool {pool}")
        with lease(1, holder={}, wait_s=0.0, directory=self.root / "leases", gpus=lambda: [Gpu("x", "x")]):
            pass
        return found


@dataclass(frozen=True)
class Trial:
    """What came of one.

    Attributes:
        moment: When the process was killed, in seconds after the start.
        victim: What it was.
        tries: How often it was materialised afterwards.
        reaped: What `vpmoe reap` said; None where it was not asked.
        faults: What is not as it has to be.
    """

    moment: float
    victim: str
    tries: int
    reaped: str | None
    faults: list[str]


class Kills:
    """Trials on one path of the graph, compared with a run that nobody disturbed."""

    def __init__(self, path: str, directory: Path, seed: int) -> None:
        self.assets = PATHS[path]
        self.directory = directory
        self.draw = random.Random(seed)
        self.before = Site(directory / "before")
        if path == "stage1":
            _finished(self.before, DATA)
        whole = Site(directory / "whole")
        self._take_over(whole)
        begun = time.monotonic()
        _finished(whole, self.assets)
        self.duration = time.monotonic() - begun
        self.wanted = whole.digests(self.assets)

    def trial(self, number: int) -> Trial:
        site = Site(self.directory / f"trial-{number}")
        self._take_over(site)
        moment = self.draw.uniform(0.2, 1.0) * self.duration
        process = site.materialize(self.assets)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(moment)
        victim = self._kill(site, process)
        process.wait(PATIENCE_S)
        reaped = site.reap() if number % 2 else None
        tries = 0
        while site.materialize(self.assets).wait(PATIENCE_S) != 0 and tries < TRIES:
            tries += 1
        faults = site.left()
        if (made := site.digests(self.assets)) != self.wanted:
            faults.append(f"made {made}, not {self.wanted}")
        if not faults:
            shutil.rmtree(site.root)
        return Trial(round(moment, 1), victim, tries + 1, reaped, faults)

    def _take_over(self, site: Site) -> None:
        if self.before.store.root.exists():
            shutil.copytree(self.before.store.root, site.store.root, symlinks=True)

    def _kill(self, site: Site, orchestrator: subprocess.Popen[bytes]) -> str:
        """Kill the orchestrator every other time, else any of the processes that it started."""
        others = [
            process
            for process in carrying(site.id)
            if process.pid != orchestrator.pid and MAKES.search(" ".join(process.cmdline()))
        ]
        victim = psutil.Process(orchestrator.pid) if orchestrator.poll() is None else None
        if others and self.draw.random() < 0.5:
            victim = self.draw.choice(others)
        if victim is None:
            return "nothing: it had finished"
        with contextlib.suppress(psutil.NoSuchProcess):
            what = "orchestrator" if victim.pid == orchestrator.pid else " ".join(victim.cmdline()[-5:])[:60]
            victim.kill()
            return what
        return "nothing: it had just ended"


def _finished(site: Site, assets: tuple[str, ...]) -> None:
    code = site.materialize(assets).wait(PATIENCE_S)
    assert code == 0, site.output.read_text(errors="replace")[-4000:]


def main() -> None:
    path, trials, *seed = sys.argv[1:]
    drawn = int(seed[0]) if seed else random.randrange(10**6)
    directory = Path(tempfile.mkdtemp(prefix="kills-"))
    if path == "stage3":
        sys.exit(on_policy(directory, int(trials), drawn))
    kills = Kills(path, directory, drawn)
    print(f"{path}: {kills.duration:.1f} s undisturbed; seed {drawn}; {directory}", flush=True)
    failed = 0
    for number in range(int(trials)):
        trial = kills.trial(number)
        failed += bool(trial.faults)
        print(f"{number}: {trial}", flush=True)
    print(f"{int(trials) - failed} of {trials} as they have to be")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
