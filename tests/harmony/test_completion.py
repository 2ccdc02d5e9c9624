"""A shard is one process's at a time, whatever became of the build that it belongs to."""

import fcntl
import os
import threading
import time

import pytest

from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.completion import ShardWork


@pytest.fixture
def work(tmp_path) -> ShardWork:
    return ShardWork(3, "key", tmp_path / "payload", tmp_path / "state")


def test_who_does_a_shard_again_waits_for_the_end_of_who_still_has_it(work) -> None:
    with work.held():
        pass
    handle = os.open(work.state_dir / "shard_03.lock", os.O_RDWR)
    fcntl.flock(handle, fcntl.LOCK_EX)
    threading.Timer(0.3, os.close, [handle]).start()  # as when its process ends
    begun = time.monotonic()
    with work.held():
        assert time.monotonic() - begun > 0.2


def test_one_that_does_not_end_is_named(work) -> None:
    said = rf"shard 03 is held by process {os.getpid()} on .* for 0\.2 s"
    with work.held(), pytest.raises(DataError, match=said), work.held(patience_s=0.2):
        raise AssertionError("two have it")
