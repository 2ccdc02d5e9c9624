"""No call of the command line ends in a traceback, hangs, or leaves something behind.

The essence runs with the tests; `VPMOE_TEST_FUZZ=20000` tries more.
"""

import json
import os

import pytest

from tests.fuzz import commands
from vpmoe_assets.project import ROOT

CALLS = int(os.environ.get("VPMOE_TEST_FUZZ", sum(len(command.options) for command in commands())))
"""Every option once, unless more are asked for."""


@pytest.mark.slow
@pytest.mark.timeout(120 + CALLS)
def test_every_option_of_every_command_under_hostile_values(forks, tmp_path):
    done = forks.run(
        ["-m", "tests.fuzz", str(CALLS), "1"],
        environment={**os.environ, "OMP_NUM_THREADS": "1"},
        directory=ROOT,
    )
    assert done.returncode == 0, done.stderr
    ended = json.loads(done.stdout)
    assert ended["wrong"] == []
    assert set(ended["codes"]) == {"0", "1", "2"}
    assert sum(ended["codes"].values()) == CALLS
    tried = set(ended["options"])
    for command in commands():
        words = " ".join(command.words)
        for option in command.options:
            assert not option.flags or any(f"{words} {flag}" in tried for flag in option.flags), (
                words,
                option,
            )
