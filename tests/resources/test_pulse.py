"""A heart beats by the watcher's clock, whatever the job's clock says."""

import json
import os
import time
from pathlib import Path

import pytest

from vpmoe_assets.resources import pulse
from vpmoe_assets.resources.pulse import Pulse


@pytest.fixture
def clock(monkeypatch):
    """The watcher's clock, which moves when it is told to."""
    now = [100.0]
    monkeypatch.setattr(pulse.time, "monotonic", lambda: now[0])

    def wait(seconds: float) -> None:
        now[0] += seconds

    return wait


def beat(path: Path, *, ahead_s: float = 0.0, at_it_s: float = 0.0, **said) -> None:
    """Write a heartbeat as a machine whose clock is `ahead_s` ahead does, and its file system with it."""
    at = time.time() + ahead_s
    scratch = path.with_suffix(".new")
    scratch.write_text(json.dumps({**said, "unix_s": at, "since_unix_s": at - at_it_s}))
    os.utime(scratch, (at, at))
    scratch.replace(path)


@pytest.mark.parametrize("ahead_s", [0.0, 86400.0, -86400.0])
def test_a_clock_that_is_wrong_makes_no_beat_older_or_younger(tmp_path, clock, ahead_s):
    heart = Pulse(tmp_path / "heartbeat")
    clock(7.0)
    assert heart.beat() == pulse.Beat(7.0)
    beat(tmp_path / "heartbeat", ahead_s=ahead_s, at_it_s=50.0, phase="save", iteration=7)
    found = heart.beat()
    assert (found.age_s, found.phase, found.iteration) == (0.0, "save", 7)
    assert found.stuck_s == pytest.approx(50.0)
    clock(30.0)
    assert (heart.beat().age_s, heart.beat().stuck_s) == (30.0, pytest.approx(80.0))
    beat(tmp_path / "heartbeat", ahead_s=ahead_s - 3600.0, phase="step", iteration=8)  # and is set back
    assert (heart.beat().age_s, heart.beat().phase) == (0.0, "step")


def test_what_an_earlier_start_left_is_no_beat(tmp_path, clock):
    beat(tmp_path / "heartbeat", phase="save", iteration=7)
    heart = Pulse(tmp_path / "heartbeat")
    clock(5.0)
    assert heart.beat() == pulse.Beat(5.0)


def test_a_job_that_waits_for_its_turn_is_expected_to_say_nothing(tmp_path, clock):
    heart = Pulse(tmp_path / "heartbeat")
    beat(tmp_path / "heartbeat", at_it_s=9.0, phase="step", iteration=3)
    assert heart.beat().phase == "step"
    clock(4000.0)
    heart.rest()
    clock(2.0)
    assert heart.beat() == pulse.Beat(2.0)


def test_a_bare_touch_is_a_beat(tmp_path, clock):
    heart = Pulse(tmp_path / "heartbeat")
    clock(9.0)
    (tmp_path / "heartbeat").write_text("{torn")
    assert heart.beat() == pulse.Beat(0.0)
