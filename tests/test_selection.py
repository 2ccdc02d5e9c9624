"""Selections that are understood without Dagster mean what they mean to Dagster."""

import dagster as dg
import pytest
from hypothesis import given
from hypothesis import strategies as st

from vpmoe_assets.commands.selection import plain_names, resolve

MADE_FROM = {"synth": (), "kd": ("synth",), "vpmoe": ("kd",), "stage": ("vpmoe", "kd"), "report": ("stage",)}
NAMES = sorted(MADE_FROM)


class Made:
    """A step, as far as selections look at it; a report uses what there is."""

    def __init__(self, name: str) -> None:
        self.asset = name
        self.inputs = () if name == "report" else MADE_FROM[name]
        self.partial = MADE_FROM[name] if name == "report" else ()


STEPS = {name: Made(name) for name in MADE_FROM}


@pytest.fixture(scope="module")
def graph():
    def asset(name):
        deps = [dg.AssetKey(["tiny", each]) for each in MADE_FROM[name]]
        return dg.asset(lambda: None, name=name, key_prefix="tiny", deps=deps)

    return dg.Definitions([asset(name) for name in MADE_FROM]).get_repository_def().asset_graph


PARTS = st.builds(
    lambda form, name: form.format(name),
    st.sampled_from(["{}", "tiny/{}", 'key:"tiny/{}"', '+key:"tiny/{}"', ' +key:"tiny/{}" ']),
    st.sampled_from(NAMES),
)


@given(st.lists(PARTS, min_size=1, max_size=3).map(",".join))
def test_what_is_understood_at_once_is_what_dagster_selects(graph, selection):
    quick = plain_names(selection, STEPS, "tiny")
    assert quick is not None
    assert set(quick) == {key.path[-1] for key in resolve(selection, graph, "tiny")}
    assert quick == [name for name in MADE_FROM if name in quick]


@pytest.mark.parametrize(
    "selection",
    ["", "kdd", "+kd", "+tiny/kd", 'key:"tiny/kd"+', 'key:"tiny/*"', 'key:"other/kd"', '"kd"', "group:data"],
)
def test_all_else_is_left_to_dagster(selection):
    assert plain_names(selection, STEPS, "tiny") is None


def test_everything_is_every_step():
    assert plain_names("*", STEPS, "tiny") == list(STEPS)
