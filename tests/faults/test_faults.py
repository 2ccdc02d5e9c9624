"""A few of the faults of `python -m tests.faults`, of ten kinds, and what they leave."""

import shutil
import sys
import warnings
from pathlib import Path

import pytest

from tests.faults import __main__ as faults
from tests.faults.mounts import why_not
from tests.sittings import read

KINDS = (
    *("orchestrator killed", "rank killed", "data worker killed", "interrupted", "full: everything"),
    *("full: checkpoint", "read-only store", "clock jumps", "two runs at once", "record half written"),
)


def test_a_fault_that_was_not_survived_is_made_again_and_its_last_word_holds() -> None:
    first = {
        "seed": 7,
        "kind": "clock jumps",
        "struck": True,
        "tries": 1,
        "seconds": 2.0,
        "wrong": ["a file"],
    }
    other = {**first, "seed": 8, "wrong": []}
    assert faults.due(7, ["interrupted"], None) == "interrupted"
    assert faults.due(7, ["interrupted"], first) == "clock jumps", "as the same fault, whatever is asked for"
    assert faults.due(8, ["interrupted"], other) is None
    counted = [
        faults.table([first, other, *more]).splitlines()[-1].split()
        for more in ([], [{**first, "wrong": []}])
    ]
    assert counted == [["all", "2", "2", "1", "1.0", "2.0"], ["all", "2", "2", "2", "1.0", "2.0"]]


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler (`cc`), by which faults are made")
def test_ten_faults_leave_everything_as_if_nothing_had_happened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if (why := why_not()) is not None:
        warnings.warn(f"no fault of a small or read-only disk is among these: {why}", stacklevel=1)
    results = tmp_path / "results.jsonl"
    given = ["--short", "--count", str(len(KINDS)), "--kinds", ",".join(KINDS), "--results", str(results)]
    monkeypatch.setattr(sys, "argv", ["faults", *given, "--directory", str(tmp_path / "lab")])
    code = faults.main()
    wrong = {each["kind"]: each for each in read(results) if each["wrong"]}
    assert (code, wrong, len(read(results))) == (0, {}, len(KINDS))
