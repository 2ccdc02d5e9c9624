"""Projects that are edited while they run: a checkout of its own, and runs in processes of their own."""

import json
import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.assets.graphs import ROOT
from tests.forks import Forks
from vpmoe_assets.codebase.tree import MEMORY, current
from vpmoe_assets.lineage.objects import ObjectStore
from vpmoe_assets.lineage.store import Store

PROGRAM = """
import json, os, signal, sys
from pathlib import Path
import trainer, vpmoe_assets
here = Path.cwd()
assert {Path(package.__file__).parents[1] for package in (trainer, vpmoe_assets)} == {here}
from tests.assets.graphs import Graph

def edit(path, old, new):
    file = here / path
    text = file.read_text()
    assert text.count(old) == 1, (path, old)
    file.write_text(text.replace(old, new))

def before(holder, name, action):
    whole = getattr(holder, name)
    def first(*arguments, **options):
        action()
        return whole(*arguments, **options)
    setattr(holder, name, first)

def after(holder, name, action):
    whole = getattr(holder, name)
    def then(*arguments, **options):
        result = whole(*arguments, **options)
        action()
        return result
    setattr(holder, name, then)

meanwhile, experiment, root, *assets = sys.argv[1:]
graph = Graph(Path(experiment), Path(root))
graph.definitions()  # everything that the code location imports is there before anything is edited
exec(meanwhile)
run = graph.run(*assets)
reused = run.reused() if run.success else {}
Path("said.json").write_text(json.dumps({"error": run.error(), "reused": reused, "log": run.log()}))
"""


@dataclass(frozen=True)
class Checkout:
    """A git checkout of the project's sources, with one commit."""

    root: Path
    forks: Forks

    @classmethod
    def make(cls, root: Path, forks: Forks) -> "Checkout":
        for path, content in current().content.items():
            (root / path).parent.mkdir(parents=True, exist_ok=True)
            (root / path).write_bytes(content)
        (root / ".gitignore").write_text("__pycache__/\nsaid.json\n/.codebase/\n")
        known = root / MEMORY.relative_to(ROOT)  # nobody has to parse what is not edited
        known.parent.mkdir()
        shutil.copyfile(MEMORY, known)
        checkout = cls(root, forks)
        checkout.git("init", "-q")
        checkout.git("add", ".")
        checkout.git("-c", "user.name=t", "-c", "user.email=t@t", "commit", "-q", "-m", "one")
        return checkout

    def git(self, *arguments: str) -> None:
        subprocess.run(["git", "-C", self.root, *arguments], check=True, capture_output=True)

    def edit(self, path: str, old: str, new: str) -> None:
        text = (self.root / path).read_text()
        assert text.count(old) == 1, f"{path} has {text.count(old)} times {old!r}"
        (self.root / path).write_text(text.replace(old, new))

    def run(
        self, experiment: Path, store: Store, *assets: str, meanwhile: str = "", workers: int = 1
    ) -> dict[str, Any]:
        """Materialise assets by their bare names; return what was said, with the exit code as `code`.

        Args:
            experiment: Its file.
            store: Where to.
            assets: What.
            meanwhile: Python that arranges for edits; see `PROGRAM`.
            workers: Processes that build shards.
        """
        said = self.root / "said.json"
        said.unlink(missing_ok=True)
        done = self.forks.run(
            ["-c", PROGRAM, meanwhile, str(experiment), str(store.root), *assets],
            environment={**os.environ, "PYTHONPATH": str(ROOT), "VPMOE_WORKERS": str(workers)},
            directory=self.root,
        )
        assert done.returncode <= 0, done.stderr[-4000:]
        found = json.loads(said.read_text()) if said.exists() else {}
        return {"code": done.returncode, **found}


def copy_of(store: Store, target: Path, *assets: str) -> Store:
    """Return a new store with all that is known of some assets of the experiment `tiny`."""
    shutil.copytree(ObjectStore(store.root).directory, ObjectStore(target).directory)
    for asset in assets:
        for part in (store.root / "tiny", store.statements.root / "tiny"):
            if (part / asset).exists():
                shutil.copytree(part / asset, target / (part / asset).relative_to(store.root))
    return Store(target)
