"""What stands by decides no byte, and nothing stands by for nothing."""

import ast
import subprocess
import sys

import pytest

from vpmoe_assets.codebase.bystanders import BYSTANDERS, bystander
from vpmoe_assets.codebase.closure import Closure, module_name
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.project import ROOT

CAUGHT = {"vpmoe_assets.lineage.errors"}


@pytest.fixture(scope="module")
def graph() -> set[str]:
    """Modules that a process loads with the graph."""
    program = (
        "import vpmoe_assets.definitions\n"
        "from vpmoe_assets.codebase.loaded import loaded_modules\n"
        "print(*loaded_modules())"
    )
    command = [sys.executable, "-c", program]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT)
    return set(done.stdout.split())


def test_every_bystander_is_there_and_is_met(
    tree: SourceTree, closures: dict[str, Closure], graph: set[str]
) -> None:
    """By a step that imports it, or because a process that makes something loads it."""
    paths = {path for closure in closures.values() for path in closure.sources}
    imported = {name for path in paths for name in tree.facts(path).imports}
    loaded = graph | tree.brought_along(["trainer.__main__"])
    assert {entry for name in loaded | imported if (entry := bystander(name))} == set(BYSTANDERS)


def test_no_bystander_is_in_a_closure(closures: dict[str, Closure]) -> None:
    for name, closure in closures.items():
        assert not [path for path in closure.sources if bystander(module_name(path))], name


@pytest.mark.parametrize("module", sorted(CAUGHT))
def test_no_step_catches_an_error_that_stands_by(
    tree: SourceTree, closures: dict[str, Closure], module: str
) -> None:
    """One that is caught may decide what is written."""
    raised = {
        node.name
        for node in ast.parse(tree.content[tree.modules[module]]).body
        if isinstance(node, ast.ClassDef)
    }
    for path in {path for closure in closures.values() for path in closure.sources}:
        for node in ast.walk(ast.parse(tree.content[path])):
            if isinstance(node, ast.ExceptHandler) and node.type is not None:
                names = {getattr(part, "id", getattr(part, "attr", None)) for part in ast.walk(node.type)}
                assert not names & raised, f"{path}:{node.lineno}"


def test_loading_the_graph_loads_no_library_that_makes_bytes(
    closures: dict[str, Closure], graph: set[str]
) -> None:
    """So that a process which makes one asset loads the code of that one."""
    rooms = {"harmony", "text", "generated", "donors", "evaluation", "synth", "hub"}
    paths = {path for closure in closures.values() for path in closure.sources}
    libraries = {module_name(path) for path in paths if not path.endswith("__init__.py")}
    libraries = {name for name in libraries if name.split(".")[1] in rooms}
    assert {name.split(".")[1] for name in libraries} == rooms
    assert not graph & libraries
