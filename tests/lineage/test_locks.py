import errno
import os
import subprocess
import sys
import time

import pytest

from vpmoe_assets.lineage import locks
from vpmoe_assets.lineage.errors import BusyError, LocksMissingError

HOLDER = """
import sys
from pathlib import Path
from vpmoe_assets.lineage import locks
with locks.hold(Path(sys.argv[1]), "it", 0):
    print("held", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def path(tmp_path):
    return tmp_path / "deep" / "x.lock"


@pytest.fixture
def held(path):
    """The lock, held by another process."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()


def test_whoever_comes_second_is_told_who_holds_it_after_the_time_it_gave(path, held):
    for wait in (0.0, 0.4):
        began = time.monotonic()
        with (
            pytest.raises(BusyError, match=rf"^the door is held by pid {held.pid} "),
            locks.hold(path, "the door", wait),
        ):
            pass
        assert wait <= time.monotonic() - began < wait + 0.3


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOTSUP])
def test_a_file_system_without_locks_is_refused_with_what_to_mount(path, monkeypatch, number):
    def flock(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(locks.fcntl, "flock", flock)
    with (
        pytest.raises(LocksMissingError, match=r"has no locks .* version 4 without nolock"),
        locks.hold(path, "it", 5),
    ):
        pytest.fail("it was taken")


def test_a_killed_holder_holds_nothing(path, held):
    held.kill()
    held.wait()
    with locks.hold(path, "it", 0):
        pass


def test_it_is_had_as_soon_as_the_holder_lets_go(path, held):
    held.stdin.close()
    with locks.hold(path, "it", 30):
        pass


def test_it_is_free_again_after_the_block_and_after_an_error_in_it(path):
    with pytest.raises(ZeroDivisionError), locks.hold(path, "it", 0):
        raise ZeroDivisionError
    with locks.hold(path, "it", 0), pytest.raises(BusyError), locks.hold(path, "it", 0):
        pass


def test_a_forked_process_does_not_keep_the_lock_of_a_parent_that_is_gone(path):
    program = HOLDER.replace('print("held"', 'child = os.fork()\n    print("held"').replace(
        "import sys", "import os, sys"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", program, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.read(10).count("held") == 2
    process.kill()
    process.wait()
    with locks.hold(path, "it", 0):
        pass
    process.stdin.close()
    assert process.stdout.read() == "", "the forked process lived until now"


def test_a_forked_process_leaves_the_lock_to_its_parent(path):
    with locks.hold(path, "it", 0):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(BusyError), locks.hold(path, "it", 0):
            pass
