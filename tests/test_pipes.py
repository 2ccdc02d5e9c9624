"""Light commands end without a word when their reader closes the pipe. Verbs are found by listing them.

A verb is a fork of a process that has imported the command; the command itself is started too.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from tests.forks import Forks
from tests.verbs import ALSO, GIVEN, MAKERS, RUNS, VERBS
from trainer.__main__ import build_parser
from trainer.contract.pipe import CLOSED_PIPE

HELPED = ((CLOSED_PIPE, ""), (0, ""))
"""argparse passes over an error of writing, which an unbuffered Python meets there."""


def trainer_commands() -> list[str]:
    actions = build_parser()._actions
    return [name for a in actions if isinstance(a, argparse._SubParsersAction) for name in a.choices]


def unread(*arguments: str, **environment: str) -> tuple[int, str]:
    """Run `python -m …` into a pipe whose reading end is closed; exit code and standard error."""
    reading, writing = os.pipe()
    os.close(reading)
    try:
        done = subprocess.run(
            [sys.executable, "-m", *arguments],
            stdout=writing,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env=os.environ | environment,
        )
    finally:
        os.close(writing)
    return done.returncode, done.stderr


def unread_fork(forks: Forks, *arguments: str, **environment: str) -> tuple[int, str]:
    """Do the same without starting a Python."""
    reading, writing = os.pipe()
    os.close(reading)
    with os.fdopen(writing, "w") as output, tempfile.TemporaryFile("w+") as errors:
        code = forks.start(
            ["-m", *arguments],
            environment=os.environ | environment,
            directory=Path.cwd(),
            output=output,
            errors=errors,
        ).wait()
        errors.seek(0)
        return code, errors.read()


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_every_verb(verb, light_forks):
    assert unread_fork(light_forks, "vpmoe_assets.cli", *verb, "--help") == (CLOSED_PIPE, "")


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_every_verb(verb, flags, artifacts, light_forks):
    required = [parameter.name for parameter in VERBS[verb].params if parameter.required]
    if verb in RUNS or MAKERS.intersection(required):
        pytest.skip("it makes things; its help was read")
    assert set(required) <= GIVEN.keys(), f"{' '.join(verb)} needs {required}: say in GIVEN what it gets"
    arguments = [*ALSO.get(verb, ()), *(text for name in required for text in GIVEN[name])]
    words = ["vpmoe_assets.cli", *verb, *arguments, *flags]
    code, said = unread_fork(light_forks, *words, VPMOE_ARTIFACTS=str(artifacts))
    refused = verb in {("card",), ("rerun",)} or (verb == ("reports",) and not flags)
    if refused:  # no checkpoint, no sources that are this project's, nothing evaluated
        assert (code, said.count("\n")) == (1, 1), "errors go to standard error"
    else:
        assert (code, said) == (CLOSED_PIPE, "")


def test_the_commands_themselves(artifacts):
    answers = [["ls"], ["ls", "--json"], ["ls", "--help"]]
    for words in answers:
        assert unread("vpmoe_assets.cli", *words, VPMOE_ARTIFACTS=str(artifacts)) == (CLOSED_PIPE, "")
    assert unread("vpmoe_assets.cli", "--help") == (CLOSED_PIPE, "")
    assert unread("vpmoe_assets.cli", "--version") == (CLOSED_PIPE, "")
    assert unread("trainer", "--help") in HELPED


@pytest.mark.parametrize("command", trainer_commands())
def test_help_of_every_command_of_the_trainer(command):
    assert unread("trainer", command, "--help") in HELPED


@pytest.mark.parametrize("flags", [[], ["--json"]], ids=["table", "json"])
def test_count(flags):
    assert unread("trainer", "count", "full", *flags) == (CLOSED_PIPE, "")


def test_an_error_keeps_its_code_where_nobody_reads():
    code, said = unread("trainer", "count", "nonesuch")
    assert code == 1
    assert said.startswith("error: ")
    assert said.count("\n") == 1


def test_head_takes_its_lines_and_nobody_complains():
    line = f"set -o pipefail; {sys.executable} -m trainer count full --json | head -1"
    done = subprocess.run(["bash", "-c", line], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("{\n", "")
    assert done.returncode in (0, CLOSED_PIPE), "0 where all of it went into the pipe before head left"
