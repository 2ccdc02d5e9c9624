"""Imports that no statement shows: each is followed from a recipe's word, and none is forgotten."""

import pytest

from trainer.contract.schema.base import plain
from trainer.contract.schema.experiment import load_experiment
from trainer.contract.schema.rungs.ladder import RECIPES
from trainer.contract.words import BACKENDS, OBJECTIVES, words
from trainer.evaluate.suite import SUITES
from vpmoe_assets.codebase.closure import Closure, module_name
from vpmoe_assets.codebase.facts import facts_of
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.codebase.words import FOLLOWED, JOBS, ROUTER_SUITE, TABLES, job_roots, named_modules


def test_every_import_by_a_computed_name_is_followed_from_a_word(
    tree: SourceTree, closures: dict[str, Closure]
) -> None:
    """A module that is missing here loads code that no fingerprint knows of: give it its line."""
    paths = {path for closure in closures.values() for path in closure.sources}
    found = {module_name(path) for path in paths if tree.facts(path).dynamic}
    assert found == set(FOLLOWED)


@pytest.mark.parametrize(
    "text",
    [
        "import importlib\nimportlib.import_module(name)",
        "from importlib import import_module\ndef f(): import_module(f'{a}.{b}')",
        "__import__(name)",
        "import runpy\nrunpy.run_module(name)",
        "import runpy\nrunpy.run_path(name)",
        "spec.loader.exec_module(module)",
        "exec(text)",
        "x = eval(text)",
        "subprocess.run([sys.executable, '-m', name])",
    ],
)
def test_whatever_loads_code_by_a_computed_name_is_seen(text: str) -> None:
    assert facts_of(text.encode(), "trainer/x.py").dynamic


def test_an_import_by_a_name_that_stands_there_is_an_import() -> None:
    text = b"from importlib import import_module\nimport_module('trainer.model.gpt')"
    facts = facts_of(text, "trainer/x.py")
    assert not facts.dynamic
    assert "trainer.model.gpt" in facts.imports


def test_a_method_that_is_called_like_a_builtin_loads_nothing() -> None:
    assert not facts_of(b"model.eval()", "trainer/x.py").dynamic


@pytest.mark.parametrize("experiment", ["smoke", "full", "bench"])
def test_the_words_of_a_training_name_its_objective_and_its_backend(experiment: str) -> None:
    recipe = load_experiment(experiment).train_recipe("vpmoe_stage1")
    assert named_modules(plain(recipe)) == sorted(
        [f"{OBJECTIVES}.{recipe.objective}", f"{BACKENDS}.{recipe.training.backend}"]
    )


def test_the_words_of_a_conversion_name_its_step() -> None:
    experiment = load_experiment("smoke")
    recipes = [experiment.convert_recipe(rung) for rung, table in experiment.rungs.items() if table.surgery]
    assert len(recipes) > 3
    for recipe in recipes:
        assert named_modules(plain(recipe)) == [f"trainer.surgery.{recipe.step}"]


def test_the_words_of_an_evaluation_name_its_suites_and_the_routers_where_there_are_experts() -> None:
    experiment = load_experiment("smoke")
    for checkpoint in experiment.ladder():
        recipe = experiment.evaluate_recipe(checkpoint)
        suites = {SUITES[name] for name in recipe.suites}
        routers = {ROUTER_SUITE} if checkpoint.startswith("vpmoe") else set()
        assert set(named_modules(plain(recipe))) == suites | routers | {f"{BACKENDS}.{recipe.backend}"}


def test_a_checkpoint_of_which_nothing_is_known_may_have_routers() -> None:
    recipe = {"checkpoints": {"a": {"format": "megatron"}, "b": {"format": "huggingface"}}}
    assert named_modules(recipe) == [ROUTER_SUITE]


@pytest.mark.parametrize("table", TABLES)
def test_what_a_table_asks_for_belongs_to_the_trainings_that_have_it_alone(
    tree: SourceTree, table: str
) -> None:
    objective = f"{OBJECTIVES}.span_ce"
    assert named_modules({"objective": "span_ce", table: {"delay": 1}}) == [objective, TABLES[table]]
    assert TABLES[table] in tree.modules
    assert named_modules({"objective": "span_ce"}) == [objective]


def test_every_module_that_a_word_can_name_is_there(tree: SourceTree) -> None:
    assert set(SUITES.values()) <= set(tree.modules)
    for package in (BACKENDS, OBJECTIVES):
        assert {f"{package}.{word}" for word in words(package)} <= set(tree.modules)
    assert {module for word in RECIPES for module in named_modules({"step": word})} <= set(tree.modules)
    for command in JOBS:
        assert set(job_roots(command, {})) <= set(tree.modules)
