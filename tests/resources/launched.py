"""What these tests share: where the programs are, what is left of them, what a failure says."""

import contextlib
from pathlib import Path

import dagster as dg
import psutil

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


def failure_message(result: dg.ExecuteInProcessResult) -> str:
    """What a failed step says."""
    (event,) = [event for event in result.all_events if event.is_step_failure]
    data = event.step_failure_data
    return (data.user_failure_data.description if data.user_failure_data else "") or str(data.error)
