"""A resource that runs the stand-in trainer inside a Dagster step."""

import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.resources.launched import PROGRAMS, PROVENANCE, TEST_ENV
from vpmoe_assets.resources import launcher
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
