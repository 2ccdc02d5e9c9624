"""Evaluations as assets: one job for all that is due, a report an artifact. The measuring is a stand-in."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import pytest

from tests.assets.graphs import PROGRAMS, write_experiment
from tests.lineage.fabricate import publish
from trainer.contract.schema.experiment import load_experiment
from vpmoe_assets.assets.evals import SHARED_INPUTS, eval_name, evals_assets
from vpmoe_assets.lineage.index import Index
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.resources import launcher
from vpmoe_assets.resources.index import IndexResource
from vpmoe_assets.resources.store import StoreResource
from vpmoe_assets.resources.trainer import TrainerResource

pytestmark = pytest.mark.slow

LADDER = ("vpdense_80_healed", "vpmoe", "vpmoe_stage1")
EVALS = tuple(eval_name(name) for name in LADDER)


class Evals:
    """The evaluation assets over a store of fabricated checkpoints."""

    def __init__(self, directory: Path) -> None:
        self.experiment = load_experiment(str(write_experiment(directory / "tiny.toml")))
        self.store = Store(directory / "artifacts")
        self.instance = dg.DagsterInstance.ephemeral()
        for name in SHARED_INPUTS:
            self.publish(name)
        for name in LADDER:
            self.publish(name)

    def publish(self, asset: str, content: bytes = b"weights") -> Record:
        return publish(
            self.store,
            asset,
            files={"data.bin": content + asset.encode()},
            experiment="tiny",
            metrics={"parameters": 1000, "num_layers": 4},
            details={"tokens": {"total": 640}} if asset == "vpmoe_stage1" else {},
        )

    def run(self, *assets: str, raises: bool = True) -> dg.ExecuteInProcessResult:
        return dg.materialize(
            [produced.definition for produced in evals_assets(self.experiment, LADDER)],
            selection=[dg.AssetKey(["tiny", asset]) for asset in assets],
            instance=self.instance,
            resources={
                "store": StoreResource(),
                "index": IndexResource(),
                "trainer": TrainerResource(poll_s=0.05, wandb="disabled"),
            },
            raise_on_error=raises,
        )

    def reused(self, result: dg.ExecuteInProcessResult) -> dict[str, bool]:
        return {
            event.materialization.asset_key.path[-1]: event.materialization.metadata["reused"].value
            for event in result.get_asset_materialization_events()
        }

    def latest(self, asset: str) -> Record:
        record = self.store.latest("tiny", asset)
        assert record is not None
        return record

    def jobs(self) -> Sequence[Path]:
        return list((self.store.root / ".work" / "tiny").glob("evaluations-*"))


@pytest.fixture
def evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Evals:
    monkeypatch.setenv("PYTHONPATH", str(PROGRAMS))
    monkeypatch.setattr(launcher, "PROGRAM", "stand_in_evaluation")
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path / "artifacts"))
    monkeypatch.setenv("VPMOE_LEASE_DIR", str(tmp_path / "leases"))
    return Evals(tmp_path)


def test_all_that_is_due_is_measured_in_one_job_and_published_one_by_one(evals: Evals) -> None:
    result = evals.run(*EVALS)
    assert evals.reused(result) == dict.fromkeys(EVALS, False)
    logs = {(evals.store.directory(evals.latest(name)) / "run" / "log.txt").read_text() for name in EVALS}
    assert logs == {f"measures {', '.join(LADDER)}\n"}
    assert evals.jobs() == [], "the job's work area is cleared once everything is published"
    roles = {ref.role for ref in evals.latest("eval_vpmoe").inputs}
    assert roles == {"vpmoe", "eval_vpdense_80_healed", *SHARED_INPUTS}
    scores = Index(evals.store.root / "index.duckdb").query(
        "SELECT object_asset, correct, total FROM evals WHERE suite = 'core8' AND task = 'piqa' ORDER BY 1"
    )
    assert [row[0] for row in scores.rows] == list(LADDER)
    assert all(total == 20 for *_, total in scores.rows)


def test_what_was_measured_is_reused_and_a_new_checkpoint_measures_itself_and_what_is_compared_with_it(
    evals: Evals,
) -> None:
    evals.run(*EVALS)
    assert evals.reused(evals.run(*EVALS)) == dict.fromkeys(EVALS, True)
    evals.publish("vpmoe", b"other weights")
    again = evals.reused(evals.run(*EVALS))
    assert again == {EVALS[0]: True, EVALS[1]: False, EVALS[2]: False}
    log = evals.store.directory(evals.latest(EVALS[2])) / "run" / "log.txt"
    assert log.read_text() == "measures vpmoe, vpmoe_stage1\n"


def test_one_evaluation_alone_takes_the_report_before_it_from_the_store(evals: Evals) -> None:
    evals.run(EVALS[0])
    evals.run(EVALS[1])
    report = json.loads((evals.store.payload(evals.latest(EVALS[1])) / "vpmoe.json").read_bytes())
    assert report["delta"]["compared_to"] == "vpdense_80_healed"


def test_a_report_does_not_depend_on_what_else_was_measured_in_its_job(evals: Evals) -> None:
    evals.run(*EVALS)
    together = [evals.latest(name).digest for name in EVALS]
    for name in EVALS:
        (evals.store.root / "tiny" / name).rename(evals.store.root / f"away-{name}")
    for name in EVALS:
        evals.run(name)
    assert [evals.latest(name).digest for name in EVALS] == together


def test_a_checkpoint_that_was_never_made_is_named(evals: Evals) -> None:
    (evals.store.root / "tiny" / "vpmoe").rename(evals.store.root / "away")
    result = evals.run(*EVALS, raises=False)
    assert not result.success
    (failure,) = [event for event in result.all_events if event.is_step_failure]
    assert "vpmoe were never published" in str(failure.step_failure_data.user_failure_data.description)
    assert evals.store.latest("tiny", EVALS[0]) is None, "nothing is measured before the question is answered"


def test_the_ladder_draws_what_there_is_and_links_the_records(evals: Evals) -> None:
    evals.run(*EVALS[:2])
    evals.run("ladder_report")
    record = evals.latest("ladder_report")
    directory = evals.store.directory(record)
    content: dict[str, Any] = json.loads((directory / "payload" / "ladder.json").read_bytes())
    assert [row["checkpoint"] for row in content["checkpoints"]] == list(LADDER[:2])
    page = (directory / "run" / "ladder.html").read_text()
    vpmoe = evals.latest("vpmoe")
    assert f'href="../../../vpmoe/{vpmoe.version}/.artifact.json"' in page
    assert (directory / "run" / f"../../../vpmoe/{vpmoe.version}/.artifact.json").resolve().is_file()
    evals.run(*EVALS)
    evals.run("ladder_report")
    rows = json.loads((evals.store.payload(evals.latest("ladder_report")) / "ladder.json").read_bytes())
    assert [row["tokens"] for row in rows["checkpoints"]] == [0, 0, 640]
