"""A kill at a random moment of the data path; `python -m tests.e2e.kills` does more, and stage 1 too."""

import random
from pathlib import Path

import pytest

from tests.e2e.kills import Kills


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_whatever_is_killed_whenever_the_same_is_made_and_nothing_is_left(tmp_path: Path) -> None:
    seed = random.randrange(10**6)
    trial = Kills("data", tmp_path, seed).trial(0)
    assert trial.faults == [], f"seed {seed}: {trial}"
