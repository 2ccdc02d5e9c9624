"""Things added to the project the way that CONTRIBUTING.md says: nothing is made again for them."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.forks import Forks
from vpmoe_assets.project import ROOT

pytestmark = pytest.mark.slow

PROGRAM = (
    "import json\n"
    "from vpmoe_assets import cli, project\n"
    "from vpmoe_assets.definitions import steps\n"
    "from vpmoe_assets.resources.launcher import available\n"
    "from trainer.contract.schema.rungs.ladder import RECIPES\n"
    "from trainer.contract.words import BACKENDS, OBJECTIVES, words\n"
    "print(json.dumps({'root': str(project.ROOT),\n"
    "    'versions': {name: step.code_version for name, step in steps.items()},\n"
    "    'words': [*words(OBJECTIVES), *words(BACKENDS), *available(), *RECIPES, *cli.main.commands,\n"
    "              *(check.name for check in steps['synth'].checks)]}))\n"
)


class Project:
    """A copy of the project."""

    def __init__(self, root: Path, forks: Forks) -> None:
        self.root, self._forks = root, forks
        for name in ("trainer", "vpmoe_assets", "configs"):
            shutil.copytree(ROOT / name, root / name, ignore=shutil.ignore_patterns("__pycache__"))
        for name in ("pyproject.toml", "requirements.lock"):
            shutil.copyfile(ROOT / name, root / name)

    def loaded(self) -> dict[str, Any]:
        """Return what a fresh process says of the copy."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith("VPMOE_")}
        environment |= {"PYTHONPATH": str(self.root), "VPMOE_ARTIFACTS": str(self.root.parent / "artifacts")}
        done = self._forks.run(["-c", PROGRAM], environment=environment, directory=self.root)
        assert done.returncode == 0, done.stderr[-3000:]
        found: dict[str, Any] = json.loads(done.stdout)
        assert found["root"] == str(self.root)
        return found

    def copy(self, file: str, to: str, *changes: tuple[str, str]) -> None:
        """Write a file like another one."""
        text = (self.root / file).read_text(encoding="utf-8")
        (self.root / to).write_text(text, encoding="utf-8")
        self.edit(to, *changes)

    def edit(self, file: str, *changes: tuple[str, str]) -> None:
        """Write each text in the place of another one in a file."""
        path = self.root / file
        text = path.read_text(encoding="utf-8")
        for old, new in changes:
            assert old in text, f"{file} has no {old!r}"
            text = text.replace(old, new)
        path.write_text(text, encoding="utf-8")


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Project:
    return Project(tmp_path_factory.mktemp("additions") / "project", forks)


@pytest.fixture(scope="module")
def before(project: Project) -> dict[str, Any]:
    return project.loaded()


def _rung(project: Project) -> None:
    """A second depth step, after the first."""
    named = [("ExpandRecipe", "DeepenRecipe"), ("DeepRung", "DeeperRung"), ('"expand"', '"deepen"')]
    project.copy("trainer/contract/schema/rungs/expand.py", "trainer/contract/schema/rungs/deepen.py", *named)
    project.copy("trainer/surgery/expand.py", "trainer/surgery/deepen.py")
    project.copy("vpmoe_assets/rungs/expand.py", "vpmoe_assets/rungs/deepen.py")
    project.edit(
        "trainer/contract/schema/rungs/ladder.py",
        (
            "\n\n\nclass Rungs",
            "\nfrom trainer.contract.schema.rungs.deepen import DeeperRung\n\n\nclass Rungs",
        ),
        ("    vpmoe: MoeRung", "    vpdense_99: DeeperRung | None = None\n    vpmoe: MoeRung"),
    )


def _loss(project: Project) -> None:
    project.copy("trainer/losses/span_ce.py", "trainer/losses/new_loss.py")


def _backend(project: Project) -> None:
    project.copy("trainer/model/backends/reference.py", "trainer/model/backends/new_backend.py")


def _launcher(project: Project) -> None:
    launchers = "vpmoe_assets/resources/launchers"
    project.copy(f"{launchers}/local.py", f"{launchers}/new_launcher.py")


def _check(project: Project) -> None:
    with (project.root / "vpmoe_assets/checks/data.py").open("a") as file:
        file.write(
            '\n\n@check("new_check")\ndef new_check(item, inputs):\n    return Verdict(True, "", {})\n'
        )
    project.edit("vpmoe_assets/assets/sources.py", ("checks=[", "checks=[checks.new_check, "))


def _verb(project: Project) -> None:
    project.copy(
        "vpmoe_assets/commands/path.py", "vpmoe_assets/commands/new_verb.py", ("def path(", "def new_verb(")
    )
    project.edit(
        "vpmoe_assets/cli.py",
        ("\n\n\nclass _Group", "\nfrom vpmoe_assets.commands.new_verb import new_verb\n\n\nclass _Group"),
        ("in (\n    ls,", "in (\n    new_verb,\n    ls,"),
    )


def _stage(project: Project) -> None:
    """One more stage, with a key of its own, and a table in the experiment."""
    project.edit(
        "trainer/contract/schema/stages.py",
        ("class Stages(", "class NewStage(StageConfig):\n    temperature: float = 1.0\n\n\nclass Stages("),
        (
            "vpmoe_stage1: StageConfig",
            "vpmoe_stage1: StageConfig\n    vpmoe_stage1b: NewStage | None = None",
        ),
    )
    with (project.root / "configs/smoke.toml").open("a") as file:
        file.write("\n[stages.vpmoe_stage1b]\nsteps = 4\ntemperature = 2.0\n")


@pytest.mark.parametrize(
    ("add", "word"),
    [
        (_rung, "deepen"),
        (_loss, "new_loss"),
        (_backend, "new_backend"),
        (_launcher, "new_launcher"),
        (_check, "new_check"),
        (_verb, "new-verb"),
        (_stage, None),
    ],
)
def test_what_is_added_is_there_and_changes_the_code_of_no_asset(
    project: Project, before: dict[str, Any], add: Callable[[Project], None], word: str | None
) -> None:
    add(project)
    after = project.loaded()
    assert word is None or (word in after["words"] and word not in before["words"])
    assert after["versions"] == before["versions"]
