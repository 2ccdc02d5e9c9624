import os
import subprocess
import sys
import time

import pytest

from tests.conftest import ROOT
from vpmoe_assets.errors import DataError, RowError, ShardRowError, WorkerError
from vpmoe_assets.harmony.pool import Progress, run_shards


class Counted:
    def __init__(self):
        self.rows = 0

    def advance(self, rows):
        self.rows += rows


def square(shard, report):
    report(10)
    print("a stray print must not end up among the results")
    return shard * shard, os.getpid()


def refuse(shard, report):
    if shard == 2:
        raise ShardRowError(2, "row 9", "synth-9", "it is wrong")
    time.sleep(0 if shard < 2 else 30)
    return shard


def die(shard, report):
    if shard == 1:
        os._exit(7)
    return shard


class PeculiarError(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def raise_peculiar(shard, report):
    raise PeculiarError("this", "that")


def test_results_come_in_shard_order_from_several_processes():
    progress = Counted()
    results = run_shards(square, 7, 3, progress)
    assert [value for value, _ in results] == [0, 1, 4, 9, 16, 25, 36]
    pids = {pid for _, pid in results}
    assert os.getpid() not in pids
    assert 1 <= len(pids) <= 3
    assert progress.rows == 70


def test_one_process_means_this_process():
    assert run_shards(square, 3, 1) == [(0, os.getpid()), (1, os.getpid()), (4, os.getpid())]
    assert run_shards(square, 0, 4) == []


def test_the_workers_own_error_reaches_the_caller_at_once():
    started = time.monotonic()
    with pytest.raises(
        ShardRowError, match=r"shard 02, row 9, synth_id 'synth-9': it is wrong\. Nothing was published"
    ):
        run_shards(refuse, 6, 2)
    assert time.monotonic() - started < 20


def test_a_worker_that_ends_by_itself_is_reported():
    with pytest.raises(
        WorkerError, match=r"worker of shard 01 ended with exit code 7\. Finished shards are kept"
    ):
        run_shards(die, 2, 2)


def test_an_error_that_cannot_travel_arrives_with_its_message():
    with pytest.raises(WorkerError, match="PeculiarError: this and that"):
        run_shards(raise_peculiar, 2, 2)


def test_errors_keep_their_type_and_message_between_processes():
    import pickle

    for error in (DataError("x"), RowError("y"), ShardRowError(3, "row 1", None, "z")):
        again = pickle.loads(pickle.dumps(error))
        assert (type(again), str(again)) == (type(error), str(error))


def test_without_a_terminal_progress_is_plain_lines(capsys):
    lines = []
    with Progress("synth_kd_v1", 30, write=lines.append, interval_s=0.0) as progress:
        progress.advance(10)
        progress.advance(20)
    assert [line.split(" rows,")[0] for line in lines] == [
        "synth_kd_v1: 10 of 30", "synth_kd_v1: 30 of 30", "synth_kd_v1: 30 of 30",
    ]  # fmt: skip
    with Progress("x", 1):
        pass
    assert "x: 0 of 1 rows" in capsys.readouterr().err


def test_on_a_terminal_progress_is_a_bar(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    with Progress("synth_kd_v1", 30) as progress:
        progress.advance(30)
    assert "100%" in capsys.readouterr().err


def test_workers_run_the_code_of_their_parent_wherever_it_works(tmp_path):
    """`python -m` would put the working directory first, and with it whatever checkout is there."""
    (tmp_path / "vpmoe_assets").mkdir()
    (tmp_path / "vpmoe_assets" / "__init__.py").write_text("raise SystemExit('code of somebody else')\n")
    code = (
        "from tests.harmony.test_pool import square\n"
        "from vpmoe_assets.harmony.pool import run_shards\n"
        "print([value for value, _ in run_shards(square, 2, 2)])\n"
    )
    done = subprocess.run(
        [sys.executable, "-P", "-c", code],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout == "[0, 1]\n", done.stderr
