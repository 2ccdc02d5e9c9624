"""A job and all that it starts import the sources that it was given, whatever else Python could find."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import pytest

from tests.resources.launched import ROOT
from trainer.contract.sources import SOURCES_ENV, ForeignSourcesError, require_meant
from vpmoe_assets.codebase.running import running_from
from vpmoe_assets.codebase.snapshot import lay_out, pack
from vpmoe_assets.resources.launcher import Launch
from vpmoe_assets.resources.launchers import local

SHOW = """
import json, os, subprocess, sys
from multiprocessing import get_context
from pathlib import Path
import trainer, vpmoe_assets
from trainer.surgery.program import run_program

def said(*arguments):
    return subprocess.check_output([sys.executable, *arguments], text=True, cwd=work)

if __name__ == "__main__":
    work, rank = Path(sys.argv[-1]).parent, os.environ.get("RANK", "0")
    child = "import trainer; print(trainer.__file__)"
    (work / f"show_{rank}.py").write_text(child)
    path = os.pathsep.join((os.environ["PYTHONPATH"], str(work / "programs")))
    log = work / f"program.{rank}"
    run_program("shown", [], log=log, environment={"PYTHONPATH": path}, beat=lambda: None)
    with get_context("spawn").Pool(1) as pool:
        worker = pool.apply(eval, ("__import__('trainer').__file__",))
    found = {
        "itself": trainer.__file__,
        "the other package": vpmoe_assets.__file__,
        "a program by its file": said(work / f"show_{rank}.py"),
        "a program elsewhere": said("-c", child),
        "a module as a program": log.read_text(),
        "a worker of its own": worker,
        "working directory": os.getcwd(),
    }
    (work / f"found.{rank}").write_text(json.dumps({name: text.strip() for name, text in found.items()}))
"""


def sources_of_the_project() -> dict[str, bytes]:
    files = [*ROOT.glob("trainer/**/*.py"), *ROOT.glob("vpmoe_assets/**/*.py")]
    return {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in files}


@pytest.fixture(scope="module")
def sources(tmp_path_factory) -> Path:
    """The project, but for a trainer that tells where everything was loaded from."""
    directory = tmp_path_factory.mktemp("laid out") / "sources"
    lay_out(pack({**sources_of_the_project(), "trainer/__main__.py": SHOW.encode()}), directory)
    return directory


def run(work: Path, sources: Path, nproc: int = 1, **environment: str) -> tuple[int, str]:
    """Run a job to its end, as an orchestrator with this environment would; exit code and console."""
    (work / "programs").mkdir()
    (work / "programs" / "shown.py").write_text("import trainer; print(trainer.__file__)\n")
    launch = Launch(
        command="train",
        experiment="smoke",
        asset="made",
        work_dir=work,
        sources=sources,
        device="cpu",
        nproc=nproc,
        environment=running_from(sources, {**os.environ, **environment}),
        marker=uuid.uuid4().hex,
        grace_s=10.0,
        wait_s=0.0,
    )
    with local.reserve(launch, print) as handle:
        handle.start()
        assert handle.process is not None
        try:
            code = handle.process.wait(100)
        finally:
            handle.stop(grace_s=5.0, log=print)
    return code, (work / "console.txt").read_text()


ENVIRONMENTS = {
    "editable": {},  # an editable install of the checkout, whose .pth file names it
    "path": {"PYTHONPATH": str(ROOT)},
    "path-with-empty-entry": {"PYTHONPATH": f"{os.pathsep}{ROOT}"},
    "safe-path": {"PYTHONSAFEPATH": "1"},
    "safe-path-and-path": {"PYTHONSAFEPATH": "1", "PYTHONPATH": str(ROOT), "PYTHONNOUSERSITE": "1"},
}


@pytest.mark.parametrize(
    ("nproc", "named"),
    # torchrun hands its environment on as it is: the plainest and the one with most in it.
    [*((1, named) for named in ENVIRONMENTS), (2, "editable"), (2, "safe-path-and-path")],
)
def test_everything_a_job_starts_is_loaded_from_its_sources(tmp_path, sources, named, nproc):
    code, console = run(tmp_path, sources, nproc, **ENVIRONMENTS[named])
    assert code == 0, console
    for rank in range(nproc):
        found = json.loads((tmp_path / f"found.{rank}").read_text())
        assert found.pop("working directory") == str(sources)
        assert {name: Path(file).parent.parent for name, file in found.items()} == dict.fromkeys(
            found, sources
        )


@pytest.fixture
def hijacked(tmp_path) -> dict[str, str]:
    """An environment whose site hooks find the trainer in the checkout, before Python looks anywhere."""
    (tmp_path / "hook").mkdir()
    (tmp_path / "hook" / "sitecustomize.py").write_text(
        "import sys\n"
        "from importlib.machinery import PathFinder\n"
        "class Finder:\n"
        "    @staticmethod\n"
        "    def find_spec(name, path=None, target=None):\n"
        f"        return PathFinder.find_spec(name, [{str(ROOT)!r}]) if name == 'trainer' else None\n"
        "sys.meta_path.insert(0, Finder)\n"
    )
    return {"PYTHONPATH": str(tmp_path / "hook")}


def test_a_trainer_that_was_found_elsewhere_refuses_to_run(tmp_path, hijacked):
    sources = tmp_path / "sources"
    lay_out(pack(sources_of_the_project()), sources)
    work = tmp_path / "work"
    work.mkdir()
    code, console = run(work, sources, **hijacked)
    assert code == 1
    assert f"trainer was loaded from {ROOT}/trainer/__init__.py" in console
    assert f"runs from {sources}" in console
    assert not (work / "STATUS").exists()


def test_a_job_by_hand_runs_from_where_it_is_found(tmp_path):
    by_hand = {name: value for name, value in os.environ.items() if name != SOURCES_ENV}
    command = [sys.executable, "-m", "trainer", "train", "--job", str(tmp_path / "none.json")]
    done = subprocess.run(command, cwd=ROOT, env=by_hand, capture_output=True, text=True, check=False)
    assert "no such job file" in done.stderr


def test_the_place_is_compared_and_not_its_spelling(tmp_path):
    (tmp_path / "real" / "trainer").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "real")
    file = str(tmp_path / "real" / "trainer" / "__init__.py")
    require_meant("trainer", file, {SOURCES_ENV: str(tmp_path / "link")})
    require_meant("trainer", file, {SOURCES_ENV: ""})
    require_meant("trainer", file, {})
    beside = str(tmp_path / "real" / "trainer_of_mine" / "__init__.py")
    for other in (beside, None):
        with pytest.raises(ForeignSourcesError, match="PYTHONPATH"):
            require_meant("trainer", other, {SOURCES_ENV: str(tmp_path / "real")})


def test_entries_of_the_path_stay_as_the_orchestrator_sees_them(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    told = running_from(Path("sources"), {"PYTHONPATH": os.pathsep.join(("mine", "", "/theirs")), "A": "b"})
    here = str(tmp_path)
    assert told["PYTHONPATH"].split(os.pathsep) == [f"{here}/sources", f"{here}/mine", here, "/theirs"]
    assert (told[SOURCES_ENV], told["A"]) == (f"{here}/sources", "b")
    assert (
        running_from(Path("/s"), {})["PYTHONPATH"]
        == running_from(Path("/s"), {"PYTHONPATH": ""})["PYTHONPATH"]
        == "/s"
    )
