"""Every parser of what comes from outside, for a few hostile inputs; `python -m tests.hostile` for many."""

import pytest

from tests.hostile.judging import judge
from tests.hostile.parsers import PARSERS


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.name)
def test_hostile_input_is_read_or_refused_by_the_error_that_is_documented(parser):
    judge(parser, 25)
