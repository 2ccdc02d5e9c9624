"""Real runs of real code locations, cancelled in every way there is; afterwards nothing may be left.

Two ranks under torchrun, in-process executor, a SQLite instance, two invented GPUs. A checkpoint takes 45 s,
longer than torchrun's own 30 s, and the ways are tried at the same time; the one with SIGTERM runs the real
trainer.
"""

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import dagster as dg
import psutil
import pytest

from tests.resources.launched import PROGRAMS, ROOT, TEST_ENV, carrying, try_all
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources.leases import Gpu, lease
from vpmoe_assets.resources.process_record import RECORD_NAME
from vpmoe_assets.resources.reaping import reap
from vpmoe_assets.resources.run_record import paths

BIN = Path(sys.executable).parent
GPUS = [Gpu("GPU-fake-0", "Invented"), Gpu("GPU-fake-1", "Invented")]
MATERIALIZE = (
    *(str(BIN / "dagster"), "asset", "materialize"),
    *("-m", "cancel_definitions", "--select", "slow_checkpoint"),
)
FINGERPRINT = "f" * 64
PATIENCE_S = 240.0  # the machine may be busy with other tests


@dataclass
class Site:
    """One instance, store and lease directory, and the id that all its processes carry."""

    root: Path
    save_s: float
    nproc: int
    real: bool = False

    def __post_init__(self) -> None:
        self.id = uuid.uuid4().hex
        self.home.mkdir(parents=True)
        (self.home / "dagster.yaml").write_text(
            "telemetry: {enabled: false}\n"
            "run_coordinator: {module: dagster._core.run_coordinator, class: DefaultRunCoordinator}\n"
            "concurrency: {pools: {granularity: op, default_limit: 1}}\n"
        )

    @property
    def home(self) -> Path:
        return self.root / "home"

    @property
    def artifacts(self) -> Path:
        return self.root / "artifacts"

    @property
    def work(self) -> Path:
        return self.artifacts / ".work" / "test" / f"slow_checkpoint-{FINGERPRINT[:8]}"

    def job(self) -> dict[str, Any]:
        """The stand-in with an invented GPU a rank, or the real trainer on the CPU with a tiny model."""
        if not self.real:
            recipe = {"steps": 100_000, "step_s": 0.2, "save_s": self.save_s}
            how = {"command": "evaluate", "program": "stand_in_trainer", "device": "cuda", "inputs": {}}
            return {**how, "recipe": recipe, "nproc": self.nproc}
        from tests.trainer.train.train_jobs import tiny_recipe, write_conversations

        never = dict.fromkeys(("training.save_interval", "training.eval_interval"), 100_000)
        recipe = tiny_recipe(steps=100_000, **never, **{"training.log_interval": 1})
        inputs = {"synth_kd_v1": str(write_conversations(self.root / "data"))}
        how = {"command": "train", "program": "slow_trainer", "device": "cpu", "inputs": inputs}
        return {**how, "recipe": recipe, "nproc": self.nproc}

    def environment(self) -> dict[str, str]:
        return {
            **os.environ,
            TEST_ENV: self.id,
            "DAGSTER_HOME": str(self.home),
            "VPMOE_ARTIFACTS": str(self.artifacts),
            "VPMOE_LEASE_DIR": str(self.root / "leases"),
            "PYTHONPATH": f"{PROGRAMS}:{ROOT}",
            "CANCEL_JOB": json.dumps(self.job()),
            "SLOW_SAVE_S": str(self.save_s),
        }

    def start(self, *command: str) -> subprocess.Popen[bytes]:
        with (self.root / "output.txt").open("ab") as output:
            self.process = subprocess.Popen(
                command, cwd=self.root, env=self.environment(), stdout=output, stderr=output
            )
        return self.process

    def materialize(self) -> subprocess.Popen[bytes]:
        return self.start(*MATERIALIZE)

    def wait_until_it_trains(self) -> None:
        def trains() -> bool:
            with contextlib.suppress(FileNotFoundError):
                return (self.work / "metrics.jsonl").read_bytes().count(b"\n") >= 2
            return False

        wait_for(trains, "the job to train", self)

    @contextlib.contextmanager
    def instance(self) -> Iterator[dg.DagsterInstance]:
        with dg.DagsterInstance.from_config(str(self.home)) as instance:
            yield instance

    def run(self) -> dg.DagsterRun:
        with self.instance() as instance:
            (run,) = instance.get_runs()
            return run

    def assert_nothing_is_left(self) -> None:
        left = carrying(self.id)
        assert not left, [(p.pid, p.cmdline()) for p in left]
        assert not (self.work / RECORD_NAME).exists()
        assert list(paths(self.artifacts)) == []
        with Store(self.artifacts).work_area("test", "slow_checkpoint", FINGERPRINT):
            pass  # the lock of the work directory is free
        with lease(2, holder={}, wait_s=0.0, directory=self.root / "leases", gpus=lambda: GPUS):
            pass  # so are the devices
        with self.instance() as instance:
            slots = instance.event_log_storage.get_concurrency_info("gpu")
            assert (slots.active_slot_count, slots.pending_step_count) == (0, 0)

    def assert_checkpoint_is_complete(self) -> None:
        (saved,) = (self.work / "checkpoints").glob("iter_*")
        assert int(saved.name[5:]) > 0
        assert (saved / ("state.json" if self.real else "complete")).exists()
        assert not list((self.work / "checkpoints").glob(".*"))
        assert (self.work / "STATUS").read_text() == "interrupted\n"

    def output(self) -> str:
        parts = [self.root / "output.txt", self.work / "console.txt"]
        return "\n".join(path.read_text(errors="replace")[-3000:] for path in parts if path.exists())


def wait_for(condition: Callable[[], bool], what: str, site: Site) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert site.process.poll() is None, f"ended before {what}"
        assert time.monotonic() < deadline, f"waited {PATIENCE_S} s for {what}"
        time.sleep(0.3)


def cancel_by_signal(site: Site, number: signal.Signals) -> None:
    process = site.materialize()
    site.wait_until_it_trains()
    process.send_signal(number)
    process.wait(PATIENCE_S)
    assert process.returncode != 0
    site.assert_nothing_is_left()
    site.assert_checkpoint_is_complete()
    assert site.run().is_failure


def kill_and_reap(site: Site) -> None:
    process = site.materialize()
    site.wait_until_it_trains()
    process.kill()
    process.wait()
    assert carrying(site.id)  # the job is still there, writing its checkpoint
    assert site.run().status == dg.DagsterRunStatus.STARTED
    with site.instance() as instance:
        assert instance.event_log_storage.get_concurrency_info("gpu").active_slot_count == 1
        (reaped,) = reap(site.artifacts, grace_s=PATIENCE_S)  # which finds the instance by itself
        assert reaped.processes >= site.nproc
        assert (reaped.needed, reaped.run_failed) == ("none", True)  # it saved and left by itself
        assert reap(site.artifacts) == []
    assert site.run().is_failure
    site.assert_nothing_is_left()
    site.assert_checkpoint_is_complete()


def terminate_in_the_ui(site: Site) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = site.start(
        *(str(BIN / "dagster-webserver"), "-m", "cancel_definitions", "-h", "127.0.0.1", "-p", str(port))
    )

    def ask(query: str, **variables: Any) -> dict[str, Any]:
        body = json.dumps({"query": query, "variables": variables}).encode()
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/graphql", body, {"Content-Type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["data"]

    def answers() -> bool:
        with contextlib.suppress(OSError):
            return bool(ask("{ version }"))
        return False

    try:
        wait_for(answers, "the web server", site)
        launched = ask(
            """mutation ($selector: JobOrPipelineSelector!) {
                 launchRun(executionParams: {selector: $selector, mode: "default"}) {
                   __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }""",
            selector={
                "repositoryLocationName": "cancel_definitions",
                "repositoryName": "__repository__",
                "pipelineName": "__ASSET_JOB",
            },
        )["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        site.wait_until_it_trains()
        terminated = ask(
            "mutation ($id: String!) { terminateRun(runId: $id) { __typename } }", id=launched["run"]["runId"]
        )
        assert terminated["terminateRun"]["__typename"] == "TerminateRunSuccess"
        wait_for(lambda: site.run().is_finished, "the run to be cancelled", site)
        assert site.run().status == dg.DagsterRunStatus.CANCELED
    finally:
        server.send_signal(signal.SIGTERM)
        server.wait(60)
    # The code server that the web server started ends when it misses its heartbeat.
    for process in carrying(site.id):
        if "api" in process.cmdline() and "grpc" in process.cmdline():
            process.terminate()
    psutil.wait_procs(carrying(site.id), timeout=30)
    site.assert_nothing_is_left()
    site.assert_checkpoint_is_complete()


WAYS = {
    "SIGINT": lambda site: cancel_by_signal(site, signal.SIGINT),
    "SIGTERM": lambda site: cancel_by_signal(site, signal.SIGTERM),
    "SIGKILL and reap": kill_and_reap,
    "UI": terminate_in_the_ui,
}


@pytest.mark.slow
@pytest.mark.timeout(700)
def test_a_checkpoint_of_45_seconds_survives_every_way_of_cancelling(tmp_path: Path) -> None:
    sites = {name: Site(tmp_path / name.replace(" ", "_"), save_s=45.0, nproc=2) for name in WAYS}
    sites["SIGTERM"].real = True
    try_all(WAYS, sites)
