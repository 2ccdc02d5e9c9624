import pytest

from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.codebase.unchanged import SourcesChangedError, loaded_here, require_unchanged


def closure(*paths: str) -> Closure:
    return Closure((), dict.fromkeys(paths, ""), {})


def test_of_a_job_nothing_runs_in_the_orchestrator():
    assert loaded_here(closure("trainer/train/run.py", "trainer/contract/canonical.py")) == []


def test_of_a_step_here_its_own_package_runs_and_the_contract():
    paths = ("vpmoe_assets/harmony/build.py", "trainer/contract/canonical.py")
    assert sorted(loaded_here(closure(*paths))) == sorted(paths)
    mixed = closure(*paths, "trainer/train/run.py")
    assert sorted(loaded_here(mixed)) == sorted(paths)


def test_what_was_saved_is_named_and_the_list_has_an_end(tmp_path):
    names = [f"trainer/m{n}.py" for n in range(7)]
    (tmp_path / "trainer").mkdir()
    for name in names:
        (tmp_path / name).write_text("")
    tree = SourceTree(tmp_path)
    require_unchanged(tree, names)
    (tmp_path / names[3]).write_text("x = 1\n")
    with pytest.raises(SourcesChangedError, match=r"^trainer/m3\.py: saved while"):
        require_unchanged(tree, names)
    require_unchanged(tree, names[:3])
    for name in names:
        (tmp_path / name).unlink()
    with pytest.raises(SourcesChangedError, match=r"^trainer/m0\.py, .*m4\.py and 2 more: saved"):
        require_unchanged(tree, names)
