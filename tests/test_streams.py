"""Commands on streams and in surroundings that are no good: closed, full, without UTF-8, one column wide."""

import os
import subprocess
import sys

import pytest

PYTHON = f"{sys.executable} -m"
COMMANDS = {"vpmoe": f"{PYTHON} vpmoe_assets.cli ls", "trainer": f"{PYTHON} trainer count smoke --rung vpmoe"}
REFUSED = {"vpmoe": f"{PYTHON} vpmoe_assets.cli path nope", "trainer": f"{PYTHON} trainer count nope"}
PLAIN = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}


def shell(line: str, artifacts, **environment: str) -> tuple[int, str, str]:
    done = subprocess.run(
        ["sh", "-c", line],
        capture_output=True,
        text=True,
        errors="surrogateescape",
        check=False,
        env=os.environ | {"VPMOE_ARTIFACTS": str(artifacts)} | environment,
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize("command", COMMANDS)
def test_an_answer_that_cannot_be_written_is_one_line_and_exit_code_1(command, artifacts):
    code, _, said = shell(f"{COMMANDS[command]} > /dev/full", artifacts)
    assert (code, said.count("\n")) == (1, 1)
    assert "No space left on device" in said


@pytest.mark.parametrize("command", COMMANDS)
def test_streams_that_are_closed_change_no_exit_code(command, artifacts):
    assert shell(f"{COMMANDS[command]} >&- <&-", artifacts) == (0, "", "")
    assert shell(f"{REFUSED[command]} 2>&-", artifacts) == (1, "", "")


def test_a_name_that_no_encoding_has_is_printed_all_the_same(artifacts):
    code, _, said = shell(
        f"{PYTHON} vpmoe_assets.cli data build --output o --input 'a\udcffb≠'", artifacts, **PLAIN
    )
    assert (code, said.count("\n")) == (1, 1)
    assert said.startswith("Error: --input: no file at a")


@pytest.mark.parametrize(("name", "value"), [("RANK", "x"), ("WORLD_SIZE", ""), ("LOCAL_RANK", "-1")])
def test_numbers_of_torchrun_that_are_none_are_named(name, value, monkeypatch, capsys):
    from trainer.__main__ import main

    monkeypatch.setenv(name, value)
    assert main(["count", "smoke"]) == 1
    assert (
        capsys.readouterr().err
        == f"error: {name} = {value!r} is no number: unset it, or start with torchrun\n"
    )
