"""Charts: nothing upon another, nothing outside, whatever the numbers are."""

import math
import re

from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe_assets.browse.charts import HEIGHT, WIDTH, Line, line_chart, number

FEW = settings(max_examples=60, deadline=None)
numbers = st.floats(allow_nan=True, allow_infinity=True) | st.integers(-(10**12), 10**12)


@FEW
@given(st.lists(st.tuples(st.integers(0, 10**6), numbers), max_size=50))
def test_a_chart_of_any_numbers_stays_within_its_frame(points):
    drawn = str(line_chart([Line("x", points)], title="t"))
    finite = [value for _, value in points if math.isfinite(value) and abs(value) < 1e100]
    assert bool(drawn) == bool(finite)
    for found in re.findall(r'points="([^"]*)"', drawn):
        for pair in found.split():
            x, y = map(float, pair.split(","))
            assert 0 <= x <= WIDTH
            assert 0 <= y <= HEIGHT


def test_numbers_are_as_short_as_they_can_be_read():
    shown = [number(value) for value in (0, 26_166_479, 3.14159, 0.00012345, 1.2e-9, 123456.7, True)]
    assert shown == ["0", "26,166,479", "3.142", "0.0001234", "1.2e-09", "123,457", "yes"]
