"""kill -9 of workers and of whole builds at any moment: nothing half-published, then identical bytes."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from tests.harmony.inputs import SEQ_LEN, build, rows, tree, write
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.build import work_dir_of
from vpmoe_assets.harmony.completion import ShardWork

pytestmark = pytest.mark.slow

PROGRAM = f"""
import sys
from pathlib import Path
from vpmoe_assets.harmony.build import build_kd
inputs, output, tokenizer = (Path(argument) for argument in sys.argv[1:4])
build_kd([inputs], output, tokenizer_dir=tokenizer, seq_len={SEQ_LEN}, valid_fraction=0.1,
         workers=int(sys.argv[4]), git_sha="0" * 40, created_unix_s=1)
"""


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    return write(tmp_path_factory.mktemp("synth") / "a.parquet", rows(300))


@pytest.fixture(scope="module")
def expected(source, tokenizer_dir, tmp_path_factory):
    output = tmp_path_factory.mktemp("expected") / "kd"
    build([source], output, tokenizer_dir)
    return tree(output)


def start(source, output, tokenizer_dir, workers):
    command = [sys.executable, "-c", PROGRAM, str(source), str(output), str(tokenizer_dir), str(workers)]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)


def wait_for_first_files(work: Path, timeout: float = 60.0) -> None:
    until = time.monotonic() + timeout
    while time.monotonic() < until:
        if list(work.glob("payload/*/*.bin")):
            return
        time.sleep(0.01)
    raise AssertionError("the build did not start to write")


@pytest.mark.parametrize("seed", range(2))
def test_a_build_killed_at_a_random_moment_resumes_to_identical_bytes(
    source, expected, tokenizer_dir, tmp_path, seed
):
    output = tmp_path / "kd"
    process = start(source, output, tokenizer_dir, workers=2)
    wait_for_first_files(work_dir_of(output))
    time.sleep(random.Random(seed).random() * 0.5)
    workers = psutil.Process(process.pid).children(recursive=True) if process.poll() is None else []
    process.kill()
    process.wait()
    process.stderr.close()
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive, "workers outlived the killed build"
    if output.exists():
        assert tree(output) == expected  # it was done before the kill
        return
    build([source], output, tokenizer_dir)
    assert tree(output) == expected
    assert list(tmp_path.iterdir()) == [output]


def test_a_killed_worker_is_reported_and_finished_shards_are_kept(source, expected, tokenizer_dir, tmp_path):
    output = tmp_path / "kd"
    process = start(source, output, tokenizer_dir, workers=2)
    wait_for_first_files(work_dir_of(output))
    children = psutil.Process(process.pid).children()
    os.kill(children[0].pid, signal.SIGKILL)
    message = process.communicate()[1]
    assert process.returncode == 1
    assert "was killed by SIGKILL. Finished shards are kept" in message
    assert not output.exists()
    assert not psutil.wait_procs(children, timeout=10)[1]
    build([source], output, tokenizer_dir, workers=2)
    assert tree(output) == expected


def test_finished_shards_are_not_built_again(source, expected, tokenizer_dir, tmp_path, monkeypatch):
    output = tmp_path / "kd"
    finish, calls = ShardWork.finish, []

    def fail_at_third(self, *arguments):
        calls.append(self.shard)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        finish(self, *arguments)

    monkeypatch.setattr(ShardWork, "finish", fail_at_third)
    with pytest.raises(OSError, match="No space left"):
        build([source], output, tokenizer_dir)
    assert not output.exists()
    monkeypatch.setattr(ShardWork, "finish", finish)
    assert build([source], output, tokenizer_dir).reused_shards == 2
    assert tree(output) == expected


def interrupted(source, output, tokenizer_dir, monkeypatch, **options):
    """A build that finished its shards and died before it published."""
    with monkeypatch.context() as patch:
        patch.setattr("vpmoe_assets.harmony.build.build_manifest", lambda *_args, **_kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            build([source], output, tokenizer_dir, **options)


@pytest.mark.parametrize("options", [{"seq_len": 900}, {"valid_fraction": 0.2}, {"num_shards": 7}])
def test_shards_of_another_configuration_are_built_again(
    source, expected, tokenizer_dir, tmp_path, monkeypatch, options
):
    output = tmp_path / "kd"
    interrupted(source, output, tokenizer_dir, monkeypatch, **options)
    assert build([source], output, tokenizer_dir).reused_shards == 0
    assert tree(output) == expected


def test_shards_of_another_input_are_built_again(source, expected, tokenizer_dir, tmp_path, monkeypatch):
    output = tmp_path / "kd"
    other = rows(300)
    other[299]["query"] += "?"
    interrupted(write(tmp_path / "b.parquet", other), output, tokenizer_dir, monkeypatch)
    assert build([source], output, tokenizer_dir).reused_shards == 0
    assert tree(output) == expected


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove", "record", "hashes"])
def test_a_finished_shard_that_was_damaged_is_built_again(
    source, expected, tokenizer_dir, tmp_path, monkeypatch, damage
):
    output = tmp_path / "kd"
    interrupted(source, output, tokenizer_dir, monkeypatch)
    work = work_dir_of(output)
    victim = work / "payload" / "train" / "shard_02_span.bin"
    if damage == "truncate":
        victim.write_bytes(victim.read_bytes()[:-1])
    elif damage == "flip":
        victim.write_bytes(b"\1" + victim.read_bytes()[1:])
    elif damage == "remove":
        victim.unlink()
    elif damage == "record":
        (work / "state" / "shard_02.done.json").write_text('{"key": ')
    else:
        (work / "state" / "shard_02.hashes.npy").unlink()
    assert build([source], output, tokenizer_dir).reused_shards == 3
    assert tree(output) == expected


def test_two_builds_of_one_output_do_not_meet(source, tokenizer_dir, tmp_path):
    import fcntl

    work = work_dir_of(tmp_path / "kd")
    work.mkdir()
    handle = os.open(work, os.O_RDONLY)
    fcntl.flock(handle, fcntl.LOCK_EX)
    with pytest.raises(DataError, match="another build works in"):
        build([source], tmp_path / "kd", tokenizer_dir)
    os.close(handle)
    build([source], tmp_path / "kd", tokenizer_dir)
