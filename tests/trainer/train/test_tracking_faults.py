"""Weights & Biases is beside a training: whatever fails there is a warning, and ends nothing."""

import logging
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from trainer.job.workdir import LOGGER
from trainer.train.tracking import NoTracker, Tracker, WandbTracker, open_tracker


class Refusing(SimpleNamespace):
    """Stands in for the SDK: fails where it is told to, and remembers the modes it was asked for."""

    def __init__(self, **failing: Exception) -> None:
        super().__init__(failing=failing, modes=[], homes=[], variables=[], torn_down=0, logged=[])

    def _may(self, what: str) -> None:
        if what in self.failing:
            raise self.failing[what]

    def Settings(self, **given: Any) -> SimpleNamespace:  # noqa: N802
        if "WANDB_INIT_TIMEOUT" in os.environ:
            raise ValueError("init_timeout\nshould be a number")
        return SimpleNamespace(**given)

    def init(self, *, mode: str, **_: Any) -> "Refusing":
        self.modes.append(mode)
        self.homes.append(os.environ.get("HOME"))
        self.variables.append({name for name in os.environ if name.startswith("WANDB_") or name == "NETRC"})
        self._may(mode)
        return self

    def teardown(self) -> None:
        self.torn_down += 1

    def log(self, values: dict[str, Any], *, step: int) -> None:
        self.logged.append(step)
        self._may("log")

    def finish(self, *, exit_code: int) -> None:
        self._may("finish")


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> pytest.LogCaptureFixture:
    monkeypatch.setattr(LOGGER, "propagate", True)
    caplog.set_level(logging.WARNING)
    return caplog


def tracked(monkeypatch: pytest.MonkeyPatch, work: Path, sdk: Any, mode: Any) -> Tracker:
    monkeypatch.setitem(sys.modules, "wandb", sdk)
    return open_tracker(
        mode, work, experiment="smoke", asset="a", fingerprint="f", anew=False, config={"steps": 1}
    )


def test_a_server_that_cannot_be_reached_costs_a_warning_and_the_run_goes_on_offline(
    tmp_path, monkeypatch, said
):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path))
    before = dict(os.environ)
    sdk = Refusing(online=ConnectionError("connection\nrefused"))
    tracker = tracked(monkeypatch, tmp_path, sdk, "online")
    tracker.log(1, {"loss": 1.0})
    assert isinstance(tracker, WandbTracker)
    assert (sdk.modes, sdk.torn_down, sdk.logged) == (["online", "offline"], 1, [1])
    assert sdk.variables[1] == set()
    assert os.environ == before
    (record,) = said.records
    assert "Weights & Biases: ConnectionError: connection refused; going on offline" in record.getMessage()


def test_variables_of_the_sdk_with_wrong_values_are_left_out(tmp_path, monkeypatch, said):
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "abc")
    sdk = Refusing()
    assert isinstance(tracked(monkeypatch, tmp_path, sdk, "offline"), WandbTracker)
    assert (sdk.modes, len(said.records)) == (["offline"], 1)
    assert os.environ["WANDB_INIT_TIMEOUT"] == "abc"


def test_without_a_home_it_has_one_in_the_work_directory(tmp_path, monkeypatch, said):
    def homeless() -> Path:
        if "HOME" in os.environ:
            return Path(os.environ["HOME"])
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(Path, "home", homeless)
    sdk = Refusing()
    usual = sdk.init

    def init(**given: Any) -> Refusing:
        Path.home()
        return usual(**given)

    sdk.init = init
    assert isinstance(tracked(monkeypatch, tmp_path, sdk, "offline"), WandbTracker)
    assert sdk.homes == [str(tmp_path / "wandb")]
    assert "HOME" not in os.environ
    assert len(said.records) == 1


@pytest.mark.parametrize("sdk", [None, Refusing(offline=OSError("no space left"))], ids=["absent", "full"])
def test_where_nothing_helps_the_curve_is_in_metrics_jsonl_alone(tmp_path, monkeypatch, said, sdk):
    tracker = tracked(monkeypatch, tmp_path, sdk, "offline")
    tracker.log(1, {"loss": 1.0})
    tracker.close(failed=False)
    assert isinstance(tracker, NoTracker)
    assert "metrics.jsonl alone" in said.records[-1].getMessage()


def test_a_run_that_breaks_off_is_told_once_and_one_that_cannot_finish_too(tmp_path, monkeypatch, said):
    sdk = Refusing(log=BrokenPipeError("gone"), finish=TimeoutError("still sending"))
    tracker = tracked(monkeypatch, tmp_path, sdk, "offline")
    for step in range(3):
        tracker.log(step, {"loss": 1.0})
    tracker.close(failed=True)
    assert sdk.logged == [0]
    assert [record.getMessage().split(": ")[1] for record in said.records] == [
        "BrokenPipeError",
        "TimeoutError",
    ]
