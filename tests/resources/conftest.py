"""A resource that runs the stand-in trainer inside a Dagster step; marked processes, as jobs have them."""

import os
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.resources.launched import PROGRAMS, PROVENANCE, ROOT, TEST_ENV
from tests.resources.marked import Start, process_marker
from vpmoe_assets.resources import launcher
from vpmoe_assets.resources.processes import MARKER_ENV, members
from vpmoe_assets.resources.trainer import TrainerResource, TrainerResult


@pytest.fixture
def test_id(monkeypatch: pytest.MonkeyPatch) -> str:
    """Marks every process that the test starts."""
    value = uuid.uuid4().hex
    monkeypatch.setenv(TEST_ENV, value)
    return value


@pytest.fixture(autouse=True)
def leases_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VPMOE_LEASE_DIR", str(tmp_path / "leases"))
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))


@pytest.fixture
def marker() -> str:
    return uuid.uuid4().hex


@pytest.fixture
def start(marker: str) -> Iterator[Start]:
    """Starts a marked Python program and waits until it says that it is ready."""
    started: list[subprocess.Popen[bytes]] = []

    def run(program: str, *arguments: str, mark: str = marker) -> subprocess.Popen[bytes]:
        process = subprocess.Popen(
            [sys.executable, "-c", program, *arguments],
            env={**os.environ, MARKER_ENV: mark, "PYTHONFAULTHANDLER": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == b"ready\n"
        return process

    yield run
    for process in started:
        for left in members(process_marker(process)) if process.poll() is None else []:
            left.kill()
        process.kill()
        process.wait()
        for stream in (process.stdout, process.stderr):
            if stream:
                stream.close()


Run = Callable[..., tuple[dg.ExecuteInProcessResult, TrainerResult | None]]


@pytest.fixture
def run_stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """Runs one job inside a Dagster step and returns Dagster's result and the trainer's, if it had one."""

    def run(
        recipe: dict[str, Any],
        *,
        instance: dg.DagsterInstance | None = None,
        fingerprint: str = "a" * 64,
        command: str = "evaluate",
        program: str = "stand_in_trainer",
        **settings: Any,
    ) -> tuple[dg.ExecuteInProcessResult, TrainerResult | None]:
        results: list[TrainerResult] = []

        @dg.asset
        def made(context: dg.AssetExecutionContext, trainer: TrainerResource) -> None:
            results.append(
                trainer.run(
                    context,
                    command=command,
                    asset="made",
                    experiment="test",
                    recipe=recipe,
                    recipe_fingerprint=fingerprint,
                    seed=1,
                    inputs={"donor": (tmp_path / "donor", "d")},
                    provenance=PROVENANCE,
                    sources=ROOT,
                    work_dir=tmp_path / "work",
                    output_dir=tmp_path / "work" / "output",
                )
            )

        monkeypatch.setattr(launcher, "PROGRAM", program)
        defaults = {"poll_s": 0.1, "grace_s": 20.0}
        result = dg.materialize(
            [made],
            instance=instance or dg.DagsterInstance.ephemeral(),
            resources={"trainer": TrainerResource(**(defaults | settings))},
            raise_on_error=False,
        )
        return result, results[0] if results else None

    return run
