"""`trainer.contract.schema` says what may be asked and what is refused; nothing in it decides a byte.

Its outcome stands resolved in the recipe, so the code of a step can be hashed without it. That holds only as
long as no step computes with a method of a recipe's table, or with a function of the schema.
"""

import ast
import importlib
import re
import sys
import types
import typing
from pathlib import Path

import pytest
from pydantic import BaseModel

from trainer.contract.schema.base import Frozen, Pinned
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.contract.schema.rungs.ladder import RECIPES
from trainer.contract.schema.training import TrainRecipe

ROOT = Path(__file__).resolve().parents[3]
CONTRACT = ROOT / "trainer" / "contract"
SCHEMA = "trainer.contract.schema"
READING = {"parse", "plain", "parse_convert_recipe", "experiment_file", "load_experiment", "load_job"}
"""The functions that others may call: they turn text into tables, or tables into plain values."""


def inner_types(annotation):
    yield annotation
    for argument in typing.get_args(annotation):
        yield from inner_types(argument)


def tables(model, found=None):
    """Return the table and all those it is made of."""
    found = set() if found is None else found
    if model not in found:
        found.add(model)
        for field in model.model_fields.values():
            for inner in inner_types(field.annotation):
                if isinstance(inner, type) and issubclass(inner, BaseModel):
                    tables(inner, found)
    return found


def public_behaviour(model):
    """Return names of public methods, properties and class variables of a table and its bases."""
    own = [base for base in model.__mro__ if base not in BaseModel.__mro__]
    return {
        f"{base.__name__}.{name}"
        for base in own
        for name in vars(base)
        if not name.startswith("_") and name not in {*model.model_fields, "model_config"}
    }


@pytest.mark.parametrize("recipe", [TrainRecipe, EvaluateRecipe, *RECIPES.values()], ids=lambda r: r.__name__)
def test_the_tables_of_a_recipe_have_fields_and_validators_and_no_other_behaviour(recipe):
    made_of = tables(recipe)
    assert len(made_of) >= 3
    assert all(issubclass(table, Frozen) for table in made_of)
    assert [found for table in made_of for found in public_behaviour(table)] == []


def test_the_walk_would_find_a_method_a_property_and_a_constant_of_a_nested_table():
    class Inner(Frozen):
        width: int

        @property
        def twice(self):
            return 2 * self.width

    class Outer(Pinned):
        inner: dict[str, tuple[Inner | None, ...]]

        def total(self):
            return 0

    assert tables(Outer) == {Outer, Inner}
    assert public_behaviour(Inner) == {"Inner.twice"}
    assert public_behaviour(Outer) == {"Outer.total", "Pinned.missing_pins", "Pinned.require_pins"}


def imports(path):
    """Modules that a file imports, anywhere in it, and the names that it takes from them."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.module, alias.name) for alias in node.names)


def files(*folders):
    return sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))


def test_the_schema_imports_the_standard_library_pydantic_itself_and_what_knows_nothing_of_it():
    def allowed(module):
        return module.partition(".")[0] in sys.stdlib_module_names

    def pure(module):
        path = ROOT / f"{module.replace('.', '/')}.py"
        return path.parent == CONTRACT and all(
            allowed(used) or pure(used) for used, _ in imports(path) if used != module
        )

    seen = set()
    for path in (CONTRACT / "schema").rglob("*.py"):
        for module, _ in imports(path):
            seen.add(module)
            good = allowed(module) or re.match(rf"pydantic\b|{SCHEMA}\.", module) or pure(module)
            assert good, f"{path.relative_to(ROOT)} imports {module}"
    assert "trainer.contract.pattern" in seen


def test_others_take_from_the_schema_types_readers_and_errors():
    taken = {
        (module, name)
        for path in files("trainer", "vpmoe_assets", "benchmarks")
        if CONTRACT / "schema" not in path.parents
        for module, name in imports(path)
        if module.startswith(SCHEMA)
    }
    assert len(taken) > 20
    for module, name in sorted(taken):
        value = getattr(importlib.import_module(module), name)
        values = value.values() if isinstance(value, dict) else [value]  # types by their word are types
        are_types = all(isinstance(one, type | types.UnionType) or typing.get_origin(one) for one in values)
        assert are_types or name in READING, f"{module}.{name} is a {type(value).__name__}"
