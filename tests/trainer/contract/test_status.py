import pytest

from trainer.contract.status import DONE, FAILED, INTERRUPTED, RUNNING, parse_status, status_line


@pytest.mark.parametrize("state", [RUNNING, DONE, INTERRUPTED])
def test_a_state_reads_back_without_a_reason(state):
    assert status_line(state) == f"{state}\n"
    assert parse_status(status_line(state)) == (state, "")


def test_a_reason_is_one_line_and_may_hold_a_colon():
    line = status_line(FAILED, "OSError: disk full\n on rank 1")
    assert line == "failed: OSError: disk full on rank 1\n"
    assert parse_status(line) == (FAILED, "OSError: disk full on rank 1")


def test_nothing_written_yet_is_no_state():
    assert parse_status("") == ("", "")
