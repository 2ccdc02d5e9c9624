import json
import subprocess

import pytest

from trainer.contract.canonical import canonical_json
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage import provenance
from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.provenance import Code, code_of, environment
from vpmoe_assets.lineage.record import CodeState


def git(root, *arguments, stdin=b"") -> bytes:
    return subprocess.run(
        ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t", *arguments],
        check=True,
        capture_output=True,
        input=stdin,
    ).stdout


def code(root) -> Code:
    return code_of(SourceTree(root))


def code_state(root) -> CodeState:
    return code(root).state


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
    assert state.git_sha == head.stdout.strip()
    assert state.git_dirty is False
    assert state.patch_digest is None


def test_changes_and_new_files_are_seen_and_ignored_files_are_not(checkout):
    clean = code_state(checkout)
    assert code(checkout).patch is None
    (checkout / "x.log").write_text("noise")
    assert code_state(checkout) == clean

    (checkout / "trainer" / "a.py").write_text("A = 2\n")
    edited = code_state(checkout)
    assert edited.git_dirty is True
    assert edited.git_sha == clean.git_sha
    assert edited.source_digest != clean.source_digest
    assert code_state(checkout) == edited

    (checkout / "trainer" / "b.py").write_text("B = 1\n")
    added = code_state(checkout)
    (checkout / "trainer" / "b.py").write_text("B = 2\n")
    assert len({edited.patch_digest, added.patch_digest, code_state(checkout).patch_digest}) == 3


def test_a_file_beside_the_sources_makes_a_tree_dirty_and_stays_out_of_the_patch(checkout):
    clean = code_state(checkout)
    digests = {clean.patch_digest}
    for text in ("one", "two"):
        (checkout / "notes.txt").write_text(text)
        (checkout / "trainer" / "model.bin").write_text(text)
        found = code(checkout)
        assert (found.state.git_dirty, found.patch) == (True, None)
        assert found.state.source_digest == clean.source_digest
        digests.add(found.state.patch_digest)
    assert len(digests) == 3


def test_what_was_saved_after_the_sources_were_read_is_not_what_ran(checkout):
    tree = SourceTree(checkout)
    (checkout / "trainer" / "a.py").write_text("A = 2\n")
    (checkout / "trainer" / "b.py").write_text("")
    late = code_of(tree)
    assert (late.state.git_dirty, late.state.patch_digest, late.patch) == (False, None, None)
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "two")
    moved = code_of(tree)  # the commit is another now, and the patch goes back from it
    assert moved.state.git_sha != late.state.git_sha
    assert moved.state.git_dirty
    assert applied(checkout, moved) == dict(tree.content)


def applied(checkout, found: Code) -> dict[str, bytes]:
    """Return the sources of the recorded commit with the recorded patch on them."""
    clone = checkout.with_name("clone")
    git(checkout.parent, "clone", "-q", checkout, clone)
    git(clone, "checkout", "-q", found.state.git_sha)
    if found.patch is not None:
        git(clone, "apply", stdin=found.patch)
    return dict(SourceTree(clone).content)


def test_the_patch_makes_the_sources_that_ran_out_of_the_commit(checkout):
    (checkout / "trainer" / "gone.py").write_text("GONE = 1\n" * 50)
    (checkout / "trainer" / "moved.py").write_text("MOVED = 1\n" * 50)
    (checkout / "trainer" / "tool.py").write_text("#!/usr/bin/python\n")
    (checkout / "trainer" / "tool.py").chmod(0o755)
    (checkout / "notes.txt").write_text("notes\n")
    git(checkout, "add", ".")
    git(checkout, "commit", "-q", "-m", "two")
    (checkout / "trainer" / "gone.py").unlink()
    (checkout / "trainer" / "moved.py").rename(checkout / "trainer" / "elsewhere.py")
    (checkout / "trainer" / "tool.py").write_text("#!/usr/bin/python3\n")
    (checkout / "trainer" / "a.py").write_bytes("A = 'häßlich'\r\nB = 2".encode())  # and no last newline
    (checkout / "trainer" / "binary.sql").write_bytes(b"\0\xff\xfe" * 100)
    (checkout / "trainer" / "empty.py").write_bytes(b"")
    (checkout / "trainer" / "added").mkdir()
    (checkout / "trainer" / "added" / "with spaces é.py").write_text("new = 1\n")
    git(checkout, "add", "trainer/empty.py")  # of the others git knows nothing
    (checkout / "notes.txt").write_text("a secret of nobody's business\n")
    (checkout / "private.py").write_text("another\n")
    status = git(checkout, "status", "--porcelain", "-z")
    objects = sorted((checkout / ".git" / "objects").rglob("*"))
    found = code(checkout)
    assert found.state.git_dirty
    assert applied(checkout, found) == dict(SourceTree(checkout).content)
    assert b"business" not in found.patch
    assert b"private" not in found.patch
    assert code(checkout) == found
    assert git(checkout, "status", "--porcelain", "-z") == status
    assert sorted((checkout / ".git" / "objects").rglob("*")) == objects


def test_settings_of_git_do_not_change_the_patch(checkout):
    (checkout / "trainer" / "a.py").write_text("A = 2\n")
    plain = code(checkout).patch
    for name, value in {
        "diff.noprefix": "true",
        "diff.mnemonicPrefix": "true",
        "diff.external": "false",
        "diff.context": "0",
        "diff.renames": "copies",
        "diff.algorithm": "patience",
        "color.ui": "always",
        "core.quotePath": "false",
    }.items():
        git(checkout, "config", name, value)
    assert code(checkout).patch == plain


def test_a_project_below_the_top_of_its_checkout_has_a_patch_from_the_top(tmp_path):
    root = tmp_path / "top" / "project"
    (root / "trainer").mkdir(parents=True)
    (root / "trainer" / "a.py").write_text("A = 1\n")
    (tmp_path / "top" / "trainer").mkdir()
    (tmp_path / "top" / "trainer" / "a.py").write_text("another project's\n")
    git(tmp_path / "top", "init", "-q")
    git(tmp_path / "top", "add", ".")
    git(tmp_path / "top", "commit", "-q", "-m", "one")
    (tmp_path / "top" / "trainer" / "a.py").write_text("changed\n")
    assert (code(root).state.git_dirty, code(root).patch) == (False, None)
    (root / "trainer" / "a.py").write_text("A = 2\n")
    found = code(root)
    assert found.patch.startswith(b"diff --git a/project/trainer/a.py b/project/trainer/a.py")
    git(tmp_path, "clone", "-q", "top", "clone")
    git(tmp_path / "clone", "apply", stdin=found.patch)
    assert SourceTree(tmp_path / "clone" / "project").content == SourceTree(root).content


def test_a_linked_worktree_has_a_patch_too(checkout, tmp_path):
    git(checkout, "worktree", "add", "-q", tmp_path / "linked")
    (tmp_path / "linked" / "trainer" / "a.py").write_text("A = 3\n")
    found = code(tmp_path / "linked")
    assert applied(checkout, found) == dict(SourceTree(tmp_path / "linked").content)
    assert not code_state(checkout).git_dirty


def test_without_git_the_commit_comes_from_the_environment_and_counts_as_dirty(tmp_path, monkeypatch):
    monkeypatch.setenv("VPMOE_GIT_SHA", "C" * 40)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))
    state = code_state(tmp_path)
    assert (state.git_sha, state.git_dirty) == ("c" * 40, True)
    monkeypatch.setenv("VPMOE_GIT_DIRTY", "0")
    assert code_state(tmp_path).git_dirty is False


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
    assert (told.git_dirty, told.patch_digest) == (False, None)
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
