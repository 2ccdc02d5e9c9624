"""The steps of `convert`: found by the word of a recipe, each a module that says what it does."""

import sys
import types
from pathlib import Path

import pytest

from trainer.contract.schema import rungs
from trainer.contract.schema.rungs.ladder import RECIPES, Rungs
from trainer.surgery.steps import described_steps, load_step

MACHINERY = {"__init__", "rung", "ladder"}


def test_each_step_is_a_module_with_the_steps_interface():
    for step in RECIPES:
        assert load_step(step).__name__ == f"trainer.surgery.{step}"


def test_each_step_has_one_module_in_the_schema_that_holds_its_recipe_its_table_and_its_surgery():
    (folder,) = map(Path, rungs.__path__)
    assert {file.stem for file in folder.glob("*.py")} == RECIPES.keys() | MACHINERY
    for step, recipe in RECIPES.items():
        assert recipe.__module__ == f"trainer.contract.schema.rungs.{step}"
        assert recipe.model_fields["surgery"].annotation.__module__ == recipe.__module__
        assert recipe.model_fields["step"].default == step
    assert len(RECIPES) == len(Rungs.model_fields)


@pytest.mark.parametrize("module", ["als", "convert", "step", "steps", "weights", "no_such_thing", "os.path"])
def test_a_module_that_is_no_step_is_not_taken_for_one(module):
    with pytest.raises(LookupError, match=f"found '{module}'; allowed: 'vocabulary', 'vpdense'"):
        load_step(module)


def test_a_module_without_the_interface_is_refused_by_what_it_lacks(monkeypatch):
    half = types.ModuleType("expand")
    half.convert = lambda conversion, out: None
    half.check = lambda job: None
    monkeypatch.setitem(sys.modules, "trainer.surgery.expand", half)
    with pytest.raises(
        LookupError, match=r"expand is no step: it has no check\(conversion, payload, outcome\)"
    ):
        load_step("expand")


def test_help_says_what_each_step_does_without_importing_it():
    lines = described_steps().splitlines()
    assert [line.split()[0] for line in lines] == list(RECIPES)
    assert all(len(line.split()) > 4 and line.endswith(".") for line in lines)
