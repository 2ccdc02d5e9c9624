"""A few kills at random moments; `python -m tests.e2e.kills` does as many as you like."""

import random
from pathlib import Path

import pytest

from tests.e2e.kills import Kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", ["data", "stage1"])
def test_whatever_is_killed_whenever_the_same_is_made_and_nothing_is_left(path: str, tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    kills = Kills(path, tmp_path, seed)
    for number in range(2):
        trial = kills.trial(number)
        assert trial.faults == [], f"seed {seed}: {trial}"
