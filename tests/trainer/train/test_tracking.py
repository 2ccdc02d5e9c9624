"""What Weights & Biases is told: which run a start belongs to, and how it ended."""

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.trainer.train.train_jobs import make_job, tiny_recipe
from tests.trainer.train.train_work import run_train, train_until
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.train.engine import Engine
from trainer.train.tracking import open_tracker

pytestmark = pytest.mark.slow

SHORT = {"steps": 3, "training.eval_interval": 100, "training.save_interval": 2}


class FakeWandb(SimpleNamespace):
    """Stands in for the SDK: remembers the ids of runs and how each was finished."""

    def __init__(self) -> None:
        super().__init__(ids=[], exits=[], steps=[], Settings=SimpleNamespace)

    def init(self, **given: Any) -> "FakeWandb":
        self.ids.append(given["id"])
        self.steps.append([])
        return self

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.steps[-1].append(step)

    def finish(self, *, exit_code: int) -> None:
        self.exits.append(exit_code)


@pytest.fixture
def wandb(monkeypatch: pytest.MonkeyPatch) -> FakeWandb:
    fake = FakeWandb()
    monkeypatch.setitem(sys.modules, "wandb", fake)
    return fake


def job_in(tmp_path: Path, conversations: Path, **execution: Any) -> Any:
    return make_job(tmp_path, conversations, recipe=tiny_recipe(**SHORT), wandb="offline", **execution)


def test_a_polite_stop_is_no_failure_and_a_restart_goes_on_with_the_same_run(tmp_path, conversations, wandb):
    job = job_in(tmp_path, conversations)
    assert train_until(job, 1) == EXIT_INTERRUPTED
    assert wandb.exits == [0]
    assert run_train(job) == EXIT_DONE
    assert wandb.exits == [0, 0]
    assert wandb.ids[0] == wandb.ids[1]
    assert wandb.steps == [[0, 1], [2, 3]]


def test_a_failure_is_a_failure(tmp_path, conversations, wandb, monkeypatch):
    def broken(*_: Any, **__: Any) -> Any:
        raise ZeroDivisionError

    monkeypatch.setattr(Engine, "step", broken)
    assert run_train(job_in(tmp_path, conversations)) == EXIT_FAILED
    assert wandb.exits == [1]


def test_a_training_that_begins_anew_is_another_run_and_stays_it(tmp_path, conversations, wandb):
    job, anew = job_in(tmp_path, conversations), job_in(tmp_path, conversations, resume=False)
    assert train_until(job, 2) == EXIT_INTERRUPTED
    assert train_until(anew, 1) == EXIT_INTERRUPTED
    assert run_train(job) == EXIT_DONE
    assert run_train(anew) == EXIT_DONE
    first, second, third, fourth = wandb.ids
    assert second == third
    assert len({first, second, fourth}) == 3, "steps 1 to 3 go to a run that does not have them yet"


def test_the_first_run_of_a_training_has_the_same_id_everywhere(tmp_path, conversations, wandb):
    for place in ("here", "there"):
        assert train_until(job_in(tmp_path / place, conversations), 1) == EXIT_INTERRUPTED
    assert wandb.ids[0] == wandb.ids[1]


def test_a_run_begins_without_launch_and_leaves_it_to_others(tmp_path, wandb, monkeypatch):
    name = "wandb.sdk.launch.inputs.internal"
    monkeypatch.delitem(sys.modules, name, raising=False)
    there = []
    monkeypatch.setattr(FakeWandb, "init", lambda self, **_: there.append(sys.modules[name]))
    open_tracker("offline", tmp_path, experiment="x", asset="y", fingerprint="f", anew=False, config={})
    assert there == [None]
    assert name not in sys.modules
