"""A program that is forked finds what one that is started finds, and has loaded nothing of this project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.forks import OURS
from tests.ranks import run_ranks

BIN = Path(sys.executable).parent
SAID = f"""
import json, os, sys
print(json.dumps({{
    "arguments": sys.argv,
    "path": sys.path,
    "directory": os.getcwd(),
    "variable": os.environ.get("VPMOE_TEST_SAID"),
    "left out": "VPMOE_TEST_LEFT_OUT" in os.environ,
    "name": __name__,
    "ours": [name for name in sys.modules if name.partition(".")[0] in {OURS!r}],
}}))
print("to standard error", file=sys.stderr)
"""
ENDS = {
    "sys.exit(7)": 7,
    "sys.exit()": 0,
    "sys.exit('said')": 1,
    "raise ValueError": 1,
    "os.kill(os.getpid(), 9)": -9,
    "os._exit(3)": 3,
}


@pytest.mark.parametrize("safe", [{}, {"PYTHONSAFEPATH": "1"}], ids=["plain", "safe-path"])
def test_arguments_path_directory_environment_and_streams_are_those_of_a_start(
    forks, tmp_path, monkeypatch, safe
):
    monkeypatch.setenv("VPMOE_TEST_LEFT_OUT", "1")
    left_out = ("VPMOE_TEST_LEFT_OUT", "PYTHONPATH")
    environment = {name: text for name, text in os.environ.items() if name not in left_out}
    environment |= {"VPMOE_TEST_SAID": "ä", "PYTHONPATH": str(tmp_path / "mine"), **safe}
    command = ["-c", SAID, "one", "--two"]
    started = subprocess.run(
        [sys.executable, *command], env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
    )
    forked = forks.run(command, environment=environment, directory=tmp_path)
    assert json.loads(started.stdout)["ours"] == []
    said, expected = json.loads(forked.stdout), json.loads(started.stdout)
    # `setuptools` adds a directory at the end when somebody imports it.
    said["path"] = said["path"][: len(expected["path"])]
    assert (said, forked.stderr, forked.returncode) == (expected, started.stderr, 0)


@pytest.mark.parametrize("end", ENDS)
def test_it_ends_as_it_says(forks, tmp_path, end):
    done = forks.run(["-c", f"import os, sys\n{end}"], environment=os.environ, directory=tmp_path)
    assert done.returncode == ENDS[end]
    assert ("said" in done.stderr, "ValueError" in done.stderr) == ("said" in end, "ValueError" in end)


def test_exit_functions_run_and_threads_are_waited_for(forks, tmp_path):
    program = (
        "import atexit, threading, time\n"
        "atexit.register(print, 'at the end')\n"
        "threading.Thread(target=lambda: (time.sleep(0.2), print('thread'))).start()\n"
    )
    done = forks.run(["-c", program], environment=os.environ, directory=tmp_path)
    assert done.stdout.split("\n") == ["thread", "at the end", ""]


def test_a_worker_has_the_python_that_was_started():
    """What the tests find beside it is found where it is: modules are imported before a worker is forked."""
    assert BIN == Path(sys.executable).parent == Path(sys.prefix) / "bin"


def _speak() -> None:
    for descriptor in (1, 2):
        os.write(descriptor, f"rank {os.environ['RANK']}\n".encode())


def test_what_ranks_say_is_what_their_test_says(capfd):
    run_ranks(2, _speak)
    said = capfd.readouterr()
    assert [sorted(stream.splitlines()) for stream in said] == [["rank 0", "rank 1"]] * 2
