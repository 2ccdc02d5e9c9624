import json
import subprocess

import pytest

from trainer.contract.canonical import canonical_json
from vpmoe_assets.lineage import provenance
from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.provenance import code_state, environment


def git(root, *arguments):
    subprocess.run(
        ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        check=True,
        capture_output=True,
    )


@pytest.fixture
def checkout(tmp_path):
    root = tmp_path / "checkout"
    (root / "trainer").mkdir(parents=True)
    (root / "trainer" / "a.py").write_text("A = 1\n")
    (root / ".gitignore").write_text("*.log\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "one")
    return root


def test_a_clean_checkout_has_its_commit_and_no_patch(checkout):
    head = subprocess.run(
        ["git", "-C", checkout, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
    )
    state = code_state(checkout)
    assert state["git_sha"] == head.stdout.strip()
    assert state["git_dirty"] is False
    assert state["patch_digest"] is None


def test_changes_and_new_files_are_seen_and_ignored_files_are_not(checkout):
    clean = code_state(checkout)
    (checkout / "x.log").write_text("noise")
    assert code_state(checkout) == clean

    (checkout / "trainer" / "a.py").write_text("A = 2\n")
    edited = code_state(checkout)
    assert edited["git_dirty"] is True
    assert edited["git_sha"] == clean["git_sha"]
    assert edited["source_digest"] != clean["source_digest"]
    assert code_state(checkout) == edited

    (checkout / "trainer" / "b.py").write_text("B = 1\n")
    added = code_state(checkout)
    (checkout / "trainer" / "b.py").write_text("B = 2\n")
    assert len({edited["patch_digest"], added["patch_digest"], code_state(checkout)["patch_digest"]}) == 3


def test_without_git_the_commit_comes_from_the_environment_and_counts_as_dirty(tmp_path, monkeypatch):
    monkeypatch.setenv("VPMOE_GIT_SHA", "C" * 40)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    state = code_state(tmp_path)
    assert (state["git_sha"], state["git_dirty"]) == ("c" * 40, True)
    monkeypatch.setenv("VPMOE_GIT_DIRTY", "0")
    assert code_state(tmp_path)["git_dirty"] is False


@pytest.mark.parametrize("declared", ["", "main", "abc123", "g" * 40])
def test_an_unknown_commit_is_an_error_with_the_remedy(tmp_path, monkeypatch, declared):
    monkeypatch.setenv("VPMOE_GIT_SHA", declared)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    with pytest.raises(ProvenanceError, match="VPMOE_GIT_SHA"):
        code_state(tmp_path)


def test_a_repository_without_commits_and_a_machine_without_git_are_errors_too(tmp_path, monkeypatch):
    git(tmp_path, "init", "-q")
    monkeypatch.delenv("VPMOE_GIT_SHA", raising=False)
    with pytest.raises(ProvenanceError, match="at least one commit"):
        code_state(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(ProvenanceError, match="git is not installed"):
        code_state(tmp_path)


@pytest.fixture
def other(tmp_path):
    """Another repository, with a commit and a changed file of its own."""
    root = tmp_path / "other"
    root.mkdir()
    (root / "file").write_text("one\n")
    git(root, "init", "-q")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "elsewhere")
    (root / "file").write_text("two\n")
    return root


LEAKS = {
    "a hook of another repository": {"GIT_DIR": "{other}/.git", "GIT_INDEX_FILE": "{other}/.git/index"},
    "a linked worktree": {"GIT_DIR": "{other}/.git", "GIT_COMMON_DIR": "{other}/.git"},
    "a tree elsewhere": {"GIT_WORK_TREE": "{other}"},
    "an index elsewhere": {"GIT_INDEX_FILE": "{other}/.git/index"},
    "objects elsewhere": {"GIT_OBJECT_DIRECTORY": "{other}/.git/objects"},
    "a namespace": {"GIT_NAMESPACE": "elsewhere"},
    "settings, numbered": {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": "core.worktree",
        "GIT_CONFIG_VALUE_0": "{other}",
    },
    "settings, in one line": {"GIT_CONFIG_PARAMETERS": "'core.worktree'='{other}'"},
    "settings, in a file": {"GIT_CONFIG_GLOBAL": "{other}/config"},
}


@pytest.mark.parametrize("leak", LEAKS)
def test_the_commit_is_the_checkouts_whatever_the_environment_says_of_another(
    checkout, other, monkeypatch, leak
):
    (other / "config").write_text(f"[core]\n\tworktree = {other}\n")
    told = code_state(checkout)
    assert (told["git_dirty"], told["patch_digest"]) == (False, None)
    for name, value in LEAKS[leak].items():
        monkeypatch.setenv(name, value.format(other=other))
    assert code_state(checkout) == told


def test_a_plain_copy_inside_another_repository_does_not_take_its_commit(other, monkeypatch):
    copy = other / "vendored"
    copy.mkdir()
    (copy / "a.py").write_text("A = 1\n")
    (other / ".gitignore").write_text("vendored/\n")
    monkeypatch.delenv("VPMOE_GIT_SHA", raising=False)
    with pytest.raises(ProvenanceError, match="holds none of its files"):
        code_state(copy)


def test_environment_is_canonical_json_with_versions_and_without_heavy_imports(monkeypatch):
    import sys

    before = set(sys.modules)
    found = environment()
    assert not {"torch", "dagster", "transformers"} & (set(sys.modules) - before)
    canonical_json(found)
    assert found["packages"]["torch"].startswith("2.")
    assert found["packages"]["megatron-core"] == "0.19.2"
    assert len(found["lock_digest"]) == 64


def test_only_variables_that_matter_are_kept_and_those_without_their_secrets(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1")
    monkeypatch.setenv("VPMOE_HUB", "https://me:pw1234@hub/x")
    monkeypatch.setenv("HOME_SWEET", "private")
    variables = environment()["variables"]
    assert variables["CUDA_VISIBLE_DEVICES"] == "0,1"
    assert variables["VPMOE_HUB"] == "https://[redacted]@hub/x"
    assert "private" not in json.dumps(variables)


def test_secret_variables_with_a_known_prefix_lose_their_value(monkeypatch):
    monkeypatch.setenv("VPMOE_API_KEY", "abc")
    assert "abc" not in json.dumps(provenance.environment()["variables"])
