"""Two values that differ are seen to differ, however long they are."""

from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.lineage.difference import Change

TEXT = st.text(st.characters(categories=["L", "N"]), max_size=90)


@given(TEXT, TEXT, TEXT)
def test_what_is_shown_of_two_values_is_short_and_differs(same, one, other):
    old, new = same + one, same + other
    said = str(Change("command", old, new))
    before, _, after = said.removeprefix("command ").partition(" → ")
    assert (before == after) == (old == new)
    assert max(len(before), len(after)) <= 61


def test_long_values_are_shown_from_where_they_part():
    path = "/opt/a/rather/long/way/to/an/environment/that/has/lib/python"
    change = Change("command", f"{path}/dagster/run.py", f"{path}/dagster/api.py")
    assert str(change) == "command …hon/dagster/run.py → …hon/dagster/api.py"
