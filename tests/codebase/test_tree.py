import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from vpmoe_assets.codebase import tree as trees
from vpmoe_assets.codebase.snapshot import unpack
from vpmoe_assets.codebase.syntax import SourceError
from vpmoe_assets.codebase.tree import SourceTree

Write = Callable[..., Path]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A small project: a trainer step with a schema, a library, a word."""
    files = {
        "trainer/__init__.py": "",
        "trainer/contract/__init__.py": "",
        "trainer/contract/schema/__init__.py": "",
        "trainer/contract/schema/job.py": "import trainer.contract.only_for_the_schema\n",
        "trainer/contract/only_for_the_schema.py": "",
        "trainer/contract/shared.py": "",
        "trainer/step/__init__.py": "from trainer.step import beside\n",
        "trainer/step/beside.py": "",
        "trainer/step/run.py": (
            "from typing import TYPE_CHECKING\n"
            "from trainer.contract import shared\n"
            "from trainer.contract.schema.job import Job\n"
            "if TYPE_CHECKING:\n    from trainer.step.typed import T\n"
            "else:\n    import trainer.step.fallback\n"
            "def f():\n    def g():\n        from trainer.step.deep import x\n"
        ),
        "trainer/step/deep.py": "x = 1\n",
        "trainer/step/typed.py": "",
        "trainer/step/fallback.py": "",
        "trainer/step/unused.py": "",
        "vpmoe_assets/__init__.py": "",
        "vpmoe_assets/index.sql": "SELECT 1",
        "configs/smoke.toml": "name = 'smoke'\n",
        "configs/notes.txt": "",
        "pyproject.toml": "",
        "requirements.lock": "",
        "README.md": "",
    }
    for name, text in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return tmp_path


def test_a_closure_has_what_is_imported_at_any_depth_and_the_packages_around_it(project: Path) -> None:
    assert list(SourceTree(project).closure(["trainer.step.run"]).sources) == [
        "trainer/__init__.py",
        "trainer/contract/__init__.py",
        "trainer/contract/shared.py",
        "trainer/step/__init__.py",
        "trainer/step/beside.py",
        "trainer/step/deep.py",
        "trainer/step/fallback.py",
        "trainer/step/run.py",
    ]


def test_a_closure_ends_at_a_bystander_and_leaves_out_what_only_that_imports(project: Path) -> None:
    assert not any("schema" in path for path in SourceTree(project).closure(["trainer.step.run"]).sources)


def test_what_only_a_type_checker_imports_is_not_followed_but_its_text_counts(project: Path) -> None:
    before = SourceTree(project).closure(["trainer.step.run"])
    assert "trainer/step/typed.py" not in before.sources
    run = project / "trainer/step/run.py"
    run.write_text(run.read_text().replace("import T\n", "import U\n"))
    assert SourceTree(project).closure(["trainer.step.run"]).digest != before.digest


def test_a_root_that_is_no_module_is_refused(project: Path) -> None:
    with pytest.raises(LookupError, match=r"trainer\.step\.gone is no module"):
        SourceTree(project).closure(["trainer.step.gone"])


def test_a_file_of_a_closure_that_does_not_parse_is_named(project: Path) -> None:
    (project / "trainer/step/deep.py").write_text("x = (\n")
    with pytest.raises(SourceError, match=r"trainer/step/deep\.py"):
        SourceTree(project).closure(["trainer.step.run"])


def test_a_tree_holds_code_configs_project_file_and_lock(project: Path) -> None:
    content = SourceTree(project).content
    assert "vpmoe_assets/index.sql" in content
    assert {path for path in content if "/" not in path or path.startswith("configs")} == {
        "configs/smoke.toml",
        "pyproject.toml",
        "requirements.lock",
    }
    assert content["trainer/step/deep.py"] == b"x = 1\n"


def test_a_tree_keeps_what_it_read_whatever_is_saved_later(project: Path) -> None:
    tree = SourceTree(project)
    (project / "trainer/step/deep.py").write_text("x = 2\n")
    assert tree.content["trainer/step/deep.py"] == b"x = 1\n"
    assert (
        tree.closure(["trainer.step.run"]).digest != SourceTree(project).closure(["trainer.step.run"]).digest
    )


def _edit(path: Path) -> None:
    path.write_text("x = 2\n")


def _put_back(path: Path) -> None:
    content = path.read_bytes()
    path.write_text("x = 2\n")
    path.write_bytes(content)


def _same_times(path: Path) -> None:
    found = path.stat()
    path.write_text("x = 2\n")
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def _replace(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(path.read_bytes())
    other.rename(path)


@pytest.mark.parametrize("touch", [_edit, _put_back, _same_times, _replace, Path.unlink])
def test_whatever_is_done_to_a_file_is_a_change(project: Path, touch: Callable[[Path], object]) -> None:
    tree = SourceTree(project)
    paths = list(tree.closure(["trainer.step.run"]).sources)
    assert tree.changed(paths) == []
    time.sleep(0.02)  # a tick of the file system's clock
    touch(project / "trainer/step/deep.py")
    assert tree.changed(paths) == ["trainer/step/deep.py"]


def test_a_file_that_was_not_there_is_a_change(project: Path) -> None:
    assert SourceTree(project).changed(["trainer/step/new.py"]) == ["trainer/step/new.py"]


def test_a_file_of_this_project_saved_since_the_process_began_is_a_change(
    project: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may have been imported as it was before, and read as it is now."""
    monkeypatch.setattr(trees, "ROOT", project)
    assert SourceTree(project).changed(["trainer/step/deep.py"]) == ["trainer/step/deep.py"]


def test_a_process_knows_when_it_began() -> None:
    program = (
        "import time; began = time.time()\n"
        "from vpmoe_assets.codebase import tree; print(began, tree._STARTED_NS)"
    )
    before = time.time()
    done = subprocess.run([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, check=True)
    began, found = map(float, done.stdout.split())
    assert before - 0.05 < found / 1e9 < began + 0.05


def test_facts_are_remembered_by_content(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = project / ".codebase/facts.json"
    first = SourceTree(project, memory=memory).closure(["trainer.step.run"])
    monkeypatch.setattr("vpmoe_assets.codebase.memory.facts_of", None)  # nothing may be found out again
    assert SourceTree(project, memory=memory).closure(["trainer.step.run"]) == first
    (project / "trainer/step/deep.py").write_text("x = 2\n")
    with pytest.raises(TypeError):
        SourceTree(project, memory=memory).closure(["trainer.step.run"])


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"finder": "another"}', '{"finder": 1, "facts": {"a": "b"}}', "\x00"]
)
def test_a_damaged_memory_is_no_obstacle(project: Path, content: str) -> None:
    memory = project / "codebase.json"
    memory.write_text(content)
    closure = SourceTree(project, memory=memory).closure(["trainer.step.run"])
    assert closure == SourceTree(project).closure(["trainer.step.run"])
    assert json.loads(memory.read_text())["facts"]


def test_a_memory_that_cannot_be_written_is_no_obstacle(project: Path) -> None:
    memory = project / "README.md/codebase.json"  # below a file: not even root can write there
    assert SourceTree(project, memory=memory).closure(["trainer.step.run"]).sources


def test_processes_that_find_out_other_things_keep_both(project: Path) -> None:
    memory = project / "codebase.json"
    one, other = SourceTree(project, memory=memory), SourceTree(project, memory=memory)
    one.closure(["trainer.step.unused"])
    other.closure(["trainer.step.typed"])
    known = len(json.loads(memory.read_text())["facts"])
    SourceTree(project, memory=memory).closure(["trainer.step.unused", "trainer.step.typed"])
    assert len(json.loads(memory.read_text())["facts"]) == known == 5


def test_a_process_reads_its_sources_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("VPMOE_ARTIFACTS", str(tmp_path))
    kept = list(trees._present)
    try:
        trees.replace_current(None)
        assert trees.current() is trees.current()
        other = SourceTree()
        trees.replace_current(other)
        assert trees.current() is other
    finally:
        trees.replace_current(kept[0] if kept else None)


def test_what_is_in_a_tree_is_said_by_the_path_alone(project: Path) -> None:
    tree = SourceTree(project)
    files = [path.relative_to(project).as_posix() for path in project.rglob("*") if path.is_file()]
    beside = [
        "configs/deep/a.toml",
        "a/pyproject.toml",
        "trainer",
        "trainer/__pycache__/a.py",
        "vpmoe_assets.py",
        *(".env", ".netrc", "launchers.toml", "trainer/.env", "trainer/step/.netrc", "vpmoe_assets/key.pem"),
    ]
    assert {path for path in (*files, *beside) if trees.is_source(path)} == set(tree.content)


def test_the_state_of_files_is_another_as_soon_as_one_was_saved_again(project: Path) -> None:
    paths = ["trainer/step/run.py", "trainer/step/deep.py"]
    first = SourceTree(project).state(paths)
    assert SourceTree(project).state(reversed(paths)) == first
    (project / "trainer/step/unused.py").write_text("unused = 1\n")
    assert SourceTree(project).state(paths) == first
    file = project / "trainer/step/deep.py"
    content, when = file.read_bytes(), file.stat()
    time.sleep(0.02)  # the file system's clock has ticks
    file.write_bytes(content)
    os.utime(file, ns=(when.st_atime_ns, when.st_mtime_ns))
    assert SourceTree(project).state(paths) != first
    assert SourceTree(project).content["trainer/step/deep.py"] == content


def test_the_archive_of_a_tree_holds_what_was_read(project: Path) -> None:
    tree = SourceTree(project)
    (project / "trainer/step/run.py").write_text("later = 1\n")
    assert unpack(tree.archive) == tree.content
    assert tree.archive != SourceTree(project).archive
