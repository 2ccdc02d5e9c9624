"""What a process does that trains with a served teacher; importable without the model that is served."""

import functools
import os
import threading
from pathlib import Path

from tests.trainer.train.train_work import run_train, train_holding_step
from trainer.contract.schema.job import Job
from trainer.teacher import server
from trainer.teacher.descriptor import URL_ENV


def train_served(job: Job, url: str, verify: bool = False) -> int:
    """Trains with the teacher at an address, and soon loses patience with it.

    Done or failed, no thread of the run is left that would go on asking.
    """
    _meet(url)
    code = run_train(job, verify)
    assert not [one.name for one in threading.enumerate() if one.name.startswith("teacher")]
    return code


def train_served_holding_step(job: Job, url: str, hold_at: int, said: Path) -> int:
    """Trains likewise until the end of a step, before its save, and waits there."""
    _meet(url)
    return train_holding_step(job, hold_at, said)


def _meet(url: str) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            del os.environ[name]
    os.environ[URL_ENV] = url
    hasty = functools.partial(server.Manners, attempts=2, first_pause=0.01)
    server.Manners = hasty  # type: ignore[misc,assignment]
