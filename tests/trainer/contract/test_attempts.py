"""`attempts.jsonl`: the starts of a job, whatever ended them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract.attempts import KILLED, Attempt, attempt, begin_attempt, end_attempt, read_attempts


class Stop(Exception):  # noqa: N818
    pass


def test_a_start_says_when_it_began_and_how_it_ended(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    with attempt(path):
        pass
    with pytest.raises(ValueError, match="loss"), attempt(path, 40):
        raise ValueError("the loss is NaN\nand more")
    with pytest.raises(Stop), attempt(path, 60, stops=(Stop,)):
        raise Stop
    with pytest.raises(KeyboardInterrupt), attempt(path, 80):
        raise KeyboardInterrupt
    found = read_attempts(path)
    assert [(each.resumed_from, each.ended) for each in found] == [
        (None, "done"),
        (40, "failed: the loss is NaN"),
        (60, "interrupted"),
        (80, "interrupted"),
    ]
    times = [time for each in found for time in (each.started_utc, each.ended_utc)]
    assert times == sorted(times)


def test_one_that_was_killed_has_no_end_until_somebody_notes_its_last_sign_of_life(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    code = (
        "import time, sys; from pathlib import Path; from trainer.contract.attempts import attempt\n"
        "with attempt(Path(sys.argv[1])): print(1, flush=True); time.sleep(600)"
    )
    child = subprocess.Popen([sys.executable, "-c", code, str(path)], stdout=subprocess.PIPE)
    assert child.stdout is not None
    child.stdout.readline()
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    (killed,) = read_attempts(path)
    assert (killed.ended_utc, killed.ended) == (None, None)
    end_attempt(path, KILLED, at_unix_s=time.time())
    end_attempt(path, "done")  # it is known already
    (killed,) = read_attempts(path)
    assert killed.ended == KILLED
    assert killed.ended_utc is not None


def test_a_sign_of_life_from_before_its_beginning_is_none(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    begin_attempt(path)
    end_attempt(path, KILLED, at_unix_s=time.time() - 60)
    (found,) = read_attempts(path)
    assert (found.ended_utc, found.ended) == (None, KILLED)


def test_no_file_has_no_starts(tmp_path: Path) -> None:
    assert read_attempts(tmp_path / "attempts.jsonl") == ()
    end_attempt(tmp_path / "attempts.jsonl", "done")
    assert read_attempts(tmp_path / "attempts.jsonl") == ()


def test_a_start_names_the_sources_that_it_ran_from(tmp_path: Path) -> None:
    path = tmp_path / "attempts.jsonl"
    with attempt(path, sources="a" * 64):
        pass
    with attempt(path, 3):
        pass
    assert [(each.sources, each.ended) for each in read_attempts(path)] == [
        ("a" * 64, "done"),
        (None, "done"),
    ]


@given(st.integers(min_value=0, max_value=600))
def test_wherever_a_kill_tears_the_last_line_the_next_start_is_read(tmp_path_factory, cut: int) -> None:
    path = tmp_path_factory.mktemp("torn") / "attempts.jsonl"
    with attempt(path):
        pass
    with attempt(path, 7, "a" * 64):
        pass
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) - min(cut, len(whole))])
    begin_attempt(path, 9)
    end_attempt(path, "done")
    found = read_attempts(path)
    assert (found[-1].resumed_from, found[-1].ended) == (9, "done")
    assert all(isinstance(each, Attempt) for each in found)
    assert len(found) <= 3
