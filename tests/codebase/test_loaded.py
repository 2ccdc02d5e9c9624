"""What a process really loaded, and which of it no fingerprint covers."""

import json
import sys
from pathlib import Path

import pytest

from vpmoe_assets.codebase import bystanders
from vpmoe_assets.codebase.loaded import loaded_modules, standing_by, unexplained, witnessed
from vpmoe_assets.codebase.tree import SourceTree

FILES = {
    "trainer/__init__.py": '"""Says nothing."""\n',
    "trainer/words/__init__.py": '"""Is listed, never imported."""\n',
    "trainer/step.py": "import trainer.library\n",
    "trainer/library.py": "",
    "trainer/beside.py": "import trainer.brought\ndef run():\n    import trainer.hidden, trainer.step\n",
    "trainer/brought.py": "BROUGHT = 1\n",
    "trainer/hidden.py": "HIDDEN = 1\n",
}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SourceTree:
    for name, text in FILES.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(bystanders, "BYSTANDERS", {"trainer.beside": "runs the step"})
    return SourceTree(tmp_path)


def test_what_stands_by_is_excused_with_what_it_brings_along_and_no_more(tree: SourceTree) -> None:
    assert standing_by(tree) >= {"trainer", "trainer.words", "trainer.beside", "trainer.brought"}
    assert not standing_by(tree) & {"trainer.step", "trainer.hidden"}


def test_a_module_that_neither_the_step_nor_what_stands_by_accounts_for_is_named(tree: SourceTree) -> None:
    closure = tree.closure(["trainer.step"])
    ordinary = [
        "trainer",
        "trainer.words",
        "trainer.step",
        "trainer.library",
        "trainer.beside",
        "trainer.brought",
    ]
    assert unexplained(tree, closure, ordinary) == []
    assert unexplained(tree, closure, [*ordinary, "trainer.hidden"]) == ["trainer.hidden"]
    assert unexplained(tree, closure, [*ordinary, "trainer.gone"]) == ["trainer.gone"]


def test_a_job_leaves_its_own_evidence(tmp_path: Path) -> None:
    (tmp_path / "modules.json").write_text('["trainer.train.run"]')
    assert witnessed(tmp_path, tmp_path / "run", frozenset()) == ["trainer.train.run"]


def test_of_this_process_it_is_what_was_loaded_since(tmp_path: Path) -> None:
    loaded = loaded_modules()
    assert witnessed(tmp_path, tmp_path, frozenset(loaded) - {"vpmoe_assets.project"}) == [
        "vpmoe_assets.project"
    ]
    assert json.loads((tmp_path / "modules.json").read_bytes()) == loaded
    assert "vpmoe_assets.codebase.loaded" in loaded
    assert set(loaded) <= set(sys.modules)
