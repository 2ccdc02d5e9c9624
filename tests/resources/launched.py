"""What these tests share: where the programs are, what is left of them, what a failure says."""

import concurrent.futures
import contextlib
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

import dagster as dg
import psutil

from vpmoe_assets.resources.warm import SETTING

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = Path(__file__).resolve().parent / "programs"
TEST_ENV = "VPMOE_TEST_ID"
PROVENANCE = {"git_sha": "0" * 40, "git_dirty": False, "source_digest": "s", "lock_digest": "l"}


def carrying(test_id: str) -> list[psutil.Process]:
    """Living processes that inherited the id from the test; zombies have no environment and do not count."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error, OSError):
            if process.environ().get(TEST_ENV) == test_id:
                found.append(process)
    return found


def bare_environment() -> dict[str, str]:
    """This process's, without what names a store, an experiment or an instance."""
    left_out = ("DAGSTER_", "VPMOE_")
    kept = {name: value for name, value in os.environ.items() if not name.startswith(left_out)}
    return {**kept, SETTING: os.environ[SETTING]} if SETTING in os.environ else kept


class Place(Protocol):
    """Where a run is tried; its processes carry the id."""

    id: str

    def output(self) -> str: ...


def try_all[P: Place](ways: Mapping[str, Callable[[P], None]], places: Mapping[str, P]) -> None:
    """Try ways for a run to end, all at the same time, each in the place of its name.

    A way that fails must not leave its own processes on the machine either.
    """
    try:
        with concurrent.futures.ThreadPoolExecutor(len(ways)) as pool:
            tries = {name: pool.submit(way, places[name]) for name, way in ways.items()}
        failures = {name: attempt.exception() for name, attempt in tries.items() if attempt.exception()}
        told = (f"{name}: {error!r}\n{places[name].output()}" for name, error in failures.items())
        assert not failures, "\n\n".join(told)
    finally:
        for place in places.values():
            for process in carrying(place.id):
                with contextlib.suppress(psutil.Error):
                    process.kill()


def failure_message(result: dg.ExecuteInProcessResult) -> str:
    """What a failed step says."""
    (event,) = [event for event in result.all_events if event.is_step_failure]
    data = event.step_failure_data
    return (data.user_failure_data.description if data.user_failure_data else "") or str(data.error)
