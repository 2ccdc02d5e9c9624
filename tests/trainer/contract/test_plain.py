"""What a fingerprint is taken over: what was asked for, nothing neutral that came later."""

import json
from typing import Annotated

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import Field, create_model

from trainer.checkpoints.format import CONFIG_NAME, write_config
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import Count, Frozen, Neutral, parse, plain
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.contract.schema.experiment import Experiment, load_experiment
from trainer.contract.schema.rungs.ladder import parse_convert_recipe
from trainer.contract.schema.training import TrainRecipe
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.lineage.fingerprint import recipe_fingerprint

RUNGS = ("qwen3_0_6b_o200k", "vpdense0_5_28", "vpdense_28", "vpdense_80", "vpmoe")


class Inner(Frozen):
    width: int
    note: str | None = None
    share: float | None = 0.5


class Table(Frozen):
    schema_: str = Field(alias="schema", default="test/1")
    steps: int
    inner: Inner | None = None
    many: Annotated[tuple[Inner, ...], Field(strict=False)] = ()
    named: dict[str, Inner | None] = Field(default={})
    free: dict[str, int | None] = Field(default={})


inners = st.builds(
    Inner,
    width=st.integers(),
    note=st.none() | st.text(),
    share=st.none() | st.floats(allow_nan=False, allow_infinity=False),
)
tables = st.builds(
    Table,
    steps=st.integers(),
    inner=st.none() | inners,
    many=st.lists(inners, max_size=3).map(tuple),
    named=st.dictionaries(st.text(), st.none() | inners, max_size=3),
    free=st.dictionaries(st.text(), st.none() | st.integers(), max_size=3),
)


def fingerprint(recipe):
    return recipe_fingerprint(recipe, Closure((), {}, {}), {})[0]


@settings(deadline=None)
@given(table=tables)
def test_what_is_written_reads_back_as_the_same_table(table):
    assert parse(Table, json.loads(json.dumps(plain(table)))) == table


@settings(deadline=None)
@given(table=tables)
def test_an_optional_key_is_there_when_it_is_asked_for_and_only_then(table):
    written = plain(table)
    assert ("inner" in written) == (table.inner is not None)
    for ours, theirs in zip(table.many, written["many"], strict=True):
        assert ("note" in theirs) == (ours.note is not None)
        assert theirs["share"] == ours.share, "None is no default here, so it must be said"
    assert written["named"].keys() == table.named.keys(), "a user's own keys are kept, whatever they hold"
    assert written["free"] == table.free
    assert written["schema"] == "test/1"


neutral_values = (
    st.booleans() | st.integers() | st.text() | st.floats(allow_nan=False, allow_infinity=False) | st.none()
)


@settings(deadline=None)
@given(table=tables, neutral=neutral_values, other=neutral_values)
def test_a_key_that_is_added_at_its_neutral_value_changes_no_fingerprint_and_at_another_it_does(
    table, neutral, other
):
    added = (Annotated[bool | int | float | str | None, Neutral()], neutral)
    later_inner = create_model("LaterInner", __base__=Inner, added=added)
    later = create_model(
        "Later",
        __base__=Table,
        added=added,
        inner=(later_inner | None, None),
        many=(Annotated[tuple[later_inner, ...], Field(strict=False)], ()),
    )
    before = fingerprint(plain(table))
    same = parse(later, plain(table))
    assert fingerprint(plain(same)) == before
    assert parse(later, plain(same)) == same
    for changed in ({"added": other}, {"many": [{"width": 1, "added": other}]}):
        table_now = parse(later, plain(table) | changed)
        assert parse(later, plain(table_now)) == table_now
        if other != neutral:
            assert fingerprint(plain(table_now)) != before


def test_a_neutral_key_needs_a_default():
    with pytest.raises(TypeError, match=r"Wrong\.key: a Neutral key needs a default"):

        class Wrong(Frozen):
            key: Annotated[Count, Neutral()]


def nulls(tree, path=""):
    if tree is None:
        yield path
    for key, value in (
        tree.items() if isinstance(tree, dict) else enumerate(tree if isinstance(tree, list) else ())
    ):
        yield from nulls(value, f"{path}.{key}")


@pytest.mark.parametrize("name", ["smoke", "full", "bench"])
def test_recipes_hold_no_nulls_and_read_back_as_themselves(name):
    experiment = load_experiment(name)
    recipes = [(plain(experiment), lambda raw: parse(Experiment, raw), experiment)]
    for run in experiment.runs():
        recipe = experiment.train_recipe(run)
        recipes.append((plain(recipe), lambda raw: parse(TrainRecipe, raw), recipe))
    for rung in RUNGS if name != "bench" else ():
        recipe = experiment.convert_recipe(rung)
        recipes.append((plain(recipe), parse_convert_recipe, recipe))
    if experiment.evaluation is not None:
        recipe = experiment.evaluate_recipe(*experiment.ladder())
        recipes.append((plain(recipe), lambda raw: parse(EvaluateRecipe, raw), recipe))
    for written, read, table in recipes:
        assert list(nulls(written)) == []
        assert read(json.loads(json.dumps(written))) == table


def test_a_recipe_holds_the_keys_of_its_own_step_alone():
    experiment = load_experiment("smoke")
    always = {"architecture", "training", "steps", "seq_len", "pack_block", "init", "objective"}
    assert plain(experiment.train_recipe("vpmoe_stage1")).keys() == always | {"kd"}
    assert plain(experiment.train_recipe("vpdense_28_healed")).keys() == always | {"harmony_fraction"}
    assert plain(experiment.train_recipe("vpdense_80_healed")).keys() == always | {
        "harmony_fraction",
        "new_layers_only_steps",
        "new_layers",
    }


def test_published_weights_hold_the_keys_of_their_recipe_and_no_others(tmp_path):
    """A key that the schema gets later must change no byte of what does not ask for it."""
    dense = load_experiment("smoke").architecture("vpdense_28")
    write_config(tmp_path, dense, dtype="float32", parameters=1, tensors=1)
    written = json.loads((tmp_path / CONFIG_NAME).read_text())["architecture"]
    assert written == plain(dense)
    assert "moe" not in written
    assert parse(Architecture, written) == dense


def test_the_neutral_value_of_a_key_never_changes():
    """Recipes leave it out: with another default they would be read as made with that."""
    found = {
        f"{table.__name__}.{name}": field.default
        for table in _tables(Frozen)
        if table.__module__.startswith("trainer.contract.schema")
        for name, field in table.model_fields.items()
        if name in table.__annotations__ and any(isinstance(item, Neutral) for item in field.metadata)
    }
    assert found == {
        "TrainRecipe.harmony_fraction": 1.0,
        "TrainRecipe.new_layers_only_steps": 0,
        "TrainRecipe.new_layers": (),
    }


def _tables(table):
    return {table, *(deeper for below in table.__subclasses__() for deeper in _tables(below))}
