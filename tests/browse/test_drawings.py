"""Charts and graphs: nothing upon another, nothing outside, whatever the numbers are."""

import math
import re
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from vpmoe_assets.browse.charts import HEIGHT, WIDTH, Line, line_chart, number
from vpmoe_assets.browse.layered import Layout

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


@st.composite
def graphs(draw):
    size = draw(st.integers(1, 14))
    return {
        str(child): sorted({str(draw(st.integers(0, child - 1))) for _ in range(draw(st.integers(0, 3)))})
        if child
        else []
        for child in range(size)
    }


@FEW
@given(graphs())
def test_a_layout_puts_parents_above_and_nothing_upon_another(parents):
    layout = Layout.of(parents, node=100.0, bend=20.0)
    assert set(layout.layer) == set(parents)
    for child, above in parents.items():
        assert all(layout.layer[parent] < layout.layer[child] for parent in above)
    for level in range(layout.layers):
        row = sorted(
            (x, 100.0 if layout.layer[name] == level else 20.0)
            for (name, at), x in layout.at.items()
            if at == level
        )
        assert all(right - left >= (a + b) / 2 - 1e-6 for (left, a), (right, b) in pairwise(row))
        assert all(size / 2 - 1e-6 <= x <= layout.width - size / 2 + 1e-6 for x, size in row)
    assert all(end[1] == start[1] + 1 for start, end in layout.edges)
    reached = {(name, layout.layer[name]): {(name, layout.layer[name])} for name in parents}
    ends = {(child, parent) for child, above in parents.items() for parent in above}
    after: dict = {}
    for start, end in layout.edges:
        after.setdefault(start, []).append(end)
    for child, parent in ends:
        waiting, found = [(parent, layout.layer[parent])], set()
        while waiting:
            if (here := waiting.pop()) not in found:
                found.add(here)
                waiting += [end for end in after.get(here, ()) if end[0] == parent or end in reached]
        assert (child, layout.layer[child]) in found
