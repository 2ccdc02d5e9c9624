"""What can be shown of an artifact of the earlier schema, and what cannot."""

import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from trainer.contract.canonical import sha256_json
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.acceptance import Named
from vpmoe_assets.lineage.digest import FileEntry, file_sha256, merkle_root
from vpmoe_assets.lineage.errors import StatementError
from vpmoe_assets.lineage.provenance import source_digest
from vpmoe_assets.lineage.record import EARLIER, Record
from vpmoe_assets.lineage.upgrading import Commits, Comparison, compare

FILES = {
    "trainer/__init__.py": "",
    "trainer/step.py": "from trainer import helper\n\ndef made():\n    return helper.X\n",
    "trainer/helper.py": "import pyarrow.parquet as pq\n\nX = pq.write_table\n",
    "vpmoe_assets/__init__.py": "",
    "requirements.lock": "numpy==2.5.5 \\\n    --hash=sha256:00\npyarrow==26.0.1\norjson==3.13.0\n",
}
RECIPE = {"rows": 60, "seed": 7}
FILE = FileEntry("data.bin", 3, "d" * 64)


def git(root: Path, *arguments: str) -> str:
    identity = ("-c", "user.name=t", "-c", "user.email=t@t", "-c", "commit.gpgsign=false")
    done = subprocess.run(["git", "-C", str(root), *identity, *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def project(tmp_path) -> Path:
    root = tmp_path / "project"
    for path, text in FILES.items():
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(text)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "then")
    return root


class Case:
    """An artifact that was made at the first commit, and the code of now."""

    def __init__(self, root: Path):
        self.root = root
        tree = SourceTree(root)
        self.commit = git(root, "rev-parse", "HEAD")
        self.code: dict[str, Any] = {
            "git_sha": self.commit,
            "git_dirty": False,
            "patch_digest": None,
            "source_digest": source_digest(tree.content),
        }
        self.environment: dict[str, Any] = {
            "lock_digest": file_sha256(root / "requirements.lock"),
            "packages": {"numpy": "2.5.5", "pyarrow": "26.0.1", "triton": None},
        }
        self.inputs = {"synth": "5" * 64}
        self.recipe = dict(RECIPE)

    @property
    def record(self) -> Record:
        payload = {
            "schema": "vpmoe.fingerprint/1",
            "recipe": self.recipe,
            "sources": {"trainer/step.py": file_sha256(self.root / "trainer/step.py")},
            "inputs": self.inputs,
        }
        fields = {
            "schema": EARLIER,
            "experiment": "smoke",
            "asset": "synth_kd_v1",
            "version": "20260131.1-dddddddd",
            "sequence": 1,
            "published_utc": "2026-01-31T12:00:00+00:00",
            "fingerprint": sha256_json(payload),
            "fingerprint_payload": payload,
            "digest": merkle_root([FILE]),
            "files": [FILE],
            "code": self.code,
            "environment": self.environment,
            "command": ("dagster",),
            "started_utc": "2026-01-31T11:00:00+00:00",
            "finished_utc": "2026-01-31T11:01:30+00:00",
        }
        return Record.model_validate(fields)

    def closure(self, *roots: str, **packages: str) -> Closure:
        """Of the code as it lies there now, with the releases that are installed now."""
        found = SourceTree(self.root).closure(roots or ("trainer.step",))
        return replace(found, packages=packages or {"pyarrow": "26.0.1"})

    def compared(self, closure: Closure | None = None, **now: Any) -> Comparison:
        closure = closure or self.closure()
        payload = {
            "schema": "vpmoe.fingerprint/2",
            "recipe": RECIPE,
            "sources": dict(closure.sources),
            "packages": dict(closure.packages),
            "inputs": {"synth": "5" * 64},
            **now,
        }
        with Commits(self.root) as commits:
            return compare(self.record, sha256_json(payload), payload, closure, commits)

    def edit(self, path: str, text: str, *, commit: bool = True) -> None:
        (self.root / path).write_text(text)
        if commit:
            git(self.root, "commit", "-qam", "later")


@pytest.fixture
def case(project) -> Case:
    return Case(project)


def test_everything_that_is_the_same_is_shown(case):
    found = case.compared()
    assert found.proven
    assert found.shown == (
        f"commit {case.commit[:12]}: clean, at hand, with the sources that were recorded",
        "code: 3 files say what they said",
        "recipe: every value is the same",
        "packages: pyarrow 26.0.1",
        "inputs: each has the same digest",
    )


def test_code_that_says_the_same_in_other_words_is_the_same(case):
    case.edit("trainer/helper.py", FILES["trainer/helper.py"] + "# a comment\n", commit=False)
    assert case.compared().proven


def test_code_that_has_changed_since_is_named_by_file(case):
    case.edit("trainer/helper.py", "from trainer import more\n\nX = 2\n")
    (case.root / "trainer" / "more.py").write_text("Y = 1\n")
    found = case.compared()
    assert not found.proven
    assert found.difference.lines() == ["code changed: trainer/helper.py", "code added: trainer/more.py"]
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ({"git_dirty": True, "patch_digest": "e" * 64}, "only a hash of that was kept"),
        ({"git_sha": "e" * 40}, "commit eeeeeeeeeeee is not in this repository; fetch it"),
        ({"source_digest": "e" * 64}, "are not those that were recorded"),
    ],
)
def test_code_that_cannot_be_shown_is_said_to_be_so(case, code, reason):
    case.code |= code
    found = case.compared()
    assert not found.proven
    (unknown,) = found.unknown
    assert unknown.startswith("its code: ")
    assert reason in unknown
    assert found.difference.sources == ()


def test_code_that_has_moved_since_cannot_be_compared(case):
    (case.root / "trainer" / "new.py").write_text("Y = 1\n")
    found = case.compared(case.closure("trainer.new", "trainer.step"))
    assert found.unknown == (f"its code: what makes it now is not in commit {case.commit[:12]}: trainer.new",)


def test_a_recipe_that_differs_is_named_by_key_with_both_values(case):
    case.recipe = {"rows": 61, "seed": 7, "gone": True}
    found = case.compared()
    assert found.difference.lines() == ["recipe gone true → (absent)", "recipe rows 61 → 60"]


def test_inputs_that_are_others_now_rule_it_out(case):
    case.inputs = {"synth": "6" * 64, "gone": "7" * 64}
    found = case.compared(inputs={"synth": "5" * 64, "more": "8" * 64})
    assert found.unequal == (
        "gone is an input no more",
        "more is an input now",
        "input synth is another one now (66666666 → 55555555)",
    )
    with pytest.raises(StatementError, match="inputs are not the present ones"):
        found.accepted((), reason="please", named=Named())


def test_the_release_of_a_program_that_stood_among_the_inputs_is_one_of_a_package(case):
    case.inputs = {"synth": "5" * 64, "external:mergekit": "0.1.5"}
    found = case.compared(case.closure(pyarrow="26.0.1", mergekit="0.1.6"))
    assert found.unequal == ()
    # The code at the commit is not seen to use it, so the release is not what it was compared by.
    assert [change.name for change in found.difference.packages] == ["mergekit"]


def test_a_release_that_was_not_recorded_is_that_of_the_lock_file_if_all_others_are(case):
    case.edit("trainer/helper.py", "import orjson\n\nX = orjson.dumps\n")
    case = Case(case.root)
    orjson = case.closure(orjson="3.13.0")
    assert case.compared(orjson).shown[3] == "packages: orjson 3.13.0 (by its lock file)"
    newer = case.compared(case.closure(orjson="3.14.0"))
    assert newer.difference.lines() == ["package orjson 3.13.0 → 3.14.0"]
    case.environment["packages"]["pyarrow"] = "25.0.0"
    unknown = "package orjson: its release was not recorded; it is 3.13.0 now"
    assert case.compared(orjson).unknown == (unknown,), "something else was installed than the lock file says"
    case.environment["packages"]["pyarrow"] = "26.0.1"
    case.environment["lock_digest"] = "e" * 64
    assert case.compared(orjson).unknown == (unknown,)


def test_a_person_accepts_what_differs_by_name_and_the_statement_says_what_was_not_shown(case):
    case.code |= {"git_dirty": True, "patch_digest": "e" * 64}
    case.recipe = {"rows": 61, "seed": 7}
    found = case.compared()
    with pytest.raises(StatementError, match="--recipe rows"):
        found.accepted((), reason="please", named=Named())
    statement = found.accepted((), reason="I compared them", named=Named(["rows"]))
    assert statement.body["unknown"] == list(found.unknown)
    assert statement.body["fingerprint"] == found.fingerprint
    assert statement.body["shown_by"] == {"commit": case.commit}
    assert statement.record == case.record.record_digest
