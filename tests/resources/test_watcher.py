"""Watching a job: a finished one is not kept waiting."""

import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from vpmoe_assets.resources.job_files import WorkFiles
from vpmoe_assets.resources.tail import MetricsTail
from vpmoe_assets.resources.watcher import Limits, Watcher


class Job:
    """Has written how it ended, and is gone after some looks."""

    waiting = False

    def __init__(self, status: Path, looks: int) -> None:
        self.looks = looks
        status.write_text("done\n")

    def poll(self) -> int | None:
        self.looks -= 1
        return None if self.looks >= 0 else 0


@pytest.mark.parametrize(("looks", "least", "most"), [(3, 0.1, 2.0), (70, 10.0, 20.0)])
def test_a_job_that_says_it_is_done_is_looked_at_often_for_a_while(tmp_path, looks, least, most, monkeypatch):
    now = 0.0

    def sleep(seconds: float) -> None:
        nonlocal now
        now += seconds

    monkeypatch.setattr(
        "vpmoe_assets.resources.watcher.time", SimpleNamespace(sleep=sleep, monotonic=lambda: now)
    )
    files = WorkFiles(tmp_path, tmp_path / "out")
    context = SimpleNamespace(assets_def=SimpleNamespace(keys=()))
    limits = Limits(stall_s=600.0, progress_s=600.0, failed_s=60.0, poll_s=1.0)
    watcher = Watcher(context, files, MetricsTail(files.metrics, total_steps=None, after_step=-1), limits)
    began = time.monotonic()
    assert watcher.follow(Job(tmp_path / "STATUS", looks)) == 0
    assert least < now < most
    assert time.monotonic() - began < 5
