"""One tiny data set, made once, and graphs on copies of it."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from filelock import FileLock

from tests.assets.graphs import DATA, Graph, ProjectCopy, Run, copy_store, write_experiment
from vpmoe_assets.codebase.tree import MEMORY, SourceTree, current, replace_current


@pytest.fixture(scope="session")
def tiny_made(tmp_path_factory) -> tuple[Graph, Run]:
    """The data of the tiny experiment, freshly made by one worker for all; so nobody may write into it."""
    base = tmp_path_factory.getbasetemp()
    directory = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "tiny"
    (directory / "dagster").mkdir(parents=True, exist_ok=True)
    with FileLock(directory / "lock"):
        instance = dg.DagsterInstance.local_temp(str(directory / "dagster"))
        graph = Graph(directory / "tiny.toml", directory / "artifacts", instance)
        made = directory / "run"
        if not made.exists():
            write_experiment(graph.experiment)
            made.write_text(graph.make(*DATA).id)
            tree = SourceTree(memory=MEMORY)  # copies of the sources start from it
            tree.closure([*tree.modules])
    return graph, Run(made.read_text(), instance)


@pytest.fixture
def tiny(tiny_made, tmp_path) -> Graph:
    """The tiny experiment with its data made, in a store of the test's own."""
    graph, _ = tiny_made
    return Graph(graph.experiment, copy_store(graph.root, tmp_path / "artifacts"))


@pytest.fixture
def graph(tiny_made, tmp_path) -> Callable[..., Graph]:
    """Make a graph over a store with the tokenizer alone, judged: ``graph({"old text": "new text"})``."""
    made, _ = tiny_made

    def make(changes: dict[str, str] | None = None, *, root: Path | None = None, file: str = "tiny") -> Graph:
        toml = write_experiment(tmp_path / f"{file}.toml", changes)
        if root is None:
            root = tmp_path / "artifacts"
            if not root.exists():
                for place in ("tiny", ".statements/tiny"):
                    copy_store(made.root / place / "o200k_tokenizer", root / place / "o200k_tokenizer")
                copy_store(made.root / ".objects", root / ".objects")
        return Graph(toml, root)

    return make


@pytest.fixture
def project_copy(tiny_made, tmp_path, monkeypatch) -> Iterator[ProjectCopy]:
    """A copy of the sources, of which the code of every step is taken from now on."""
    before = current()
    monkeypatch.setenv("VPMOE_GIT_SHA", "c" * 40)  # git knows nothing of the copy
    yield ProjectCopy.make(tmp_path)
    replace_current(before)


@pytest.fixture(autouse=True)
def no_experiment_from_outside(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    monkeypatch.delenv("VPMOE_ARTIFACTS", raising=False)
    monkeypatch.delenv("VPMOE_WORKERS", raising=False)
