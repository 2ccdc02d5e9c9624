"""The sources of this project, and the code of every step that there is."""

import runpy
from pathlib import Path

import pytest

from trainer.contract.schema.rungs.ladder import RECIPES
from trainer.contract.words import BACKENDS, OBJECTIVES, words
from vpmoe_assets.assets.step import Step
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.codebase.words import job_roots

EXPERIMENTS = ("smoke", "full", "bench")


@pytest.fixture(scope="session")
def memory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where facts of sources are remembered: the tests read many states of the project."""
    return tmp_path_factory.mktemp("memory") / "codebase.json"


@pytest.fixture(scope="session")
def tree(memory: Path) -> SourceTree:
    """The project as it is."""
    return SourceTree(memory=memory)


@pytest.fixture(scope="session")
def steps() -> dict[str, dict[str, Step]]:
    """Steps of every experiment that comes with the project, by experiment and asset."""
    found = {}
    for experiment in EXPERIMENTS:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("VPMOE_EXPERIMENT", experiment)
            found[experiment] = runpy.run_module("vpmoe_assets.definitions")["steps"]
    return found


@pytest.fixture(scope="session")
def closures(tree: SourceTree, steps: dict[str, dict[str, Step]]) -> dict[str, Closure]:
    """The code of every step of those experiments, and of every job that a recipe can ask for."""
    roots = {
        f"{experiment}/{asset}": list(step.closure.roots)
        for experiment, made in steps.items()
        for asset, step in made.items()
    }
    for word in words(OBJECTIVES):
        roots[f"objective {word}"] = job_roots("train", {"objective": word})
    for word in words(BACKENDS):
        roots[f"backend {word}"] = job_roots("train", {"training": {"backend": word}})
    for word in RECIPES:
        roots[f"step {word}"] = job_roots("convert", {"step": word})
    return {name: tree.closure(modules) for name, modules in roots.items()}
