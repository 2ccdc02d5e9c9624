"""Where a command started in the project's root keeps its Dagster instance: `make` writes it into `.env`."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import dagster as dg
import pytest
from dagster._core.secrets.env_file import get_env_var_dict

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """What of a checkout decides where the instance lies."""
    root = tmp_path / "a check out"
    root.mkdir()
    for name in ("Makefile", "dagster.yaml"):
        shutil.copy(ROOT / name, root)
    return root


def make(root: Path) -> dict[str, str]:
    """Let make see to `.env`, and read it as Dagster does."""
    subprocess.run(["make", "-s", ".env"], cwd=root, check=True, env={"PATH": os.environ["PATH"]})
    return get_env_var_dict(str(root))


def test_it_is_the_checkout_by_its_absolute_path_in_every_state_of_the_file(checkout):
    wanted = {"DAGSTER_HOME": str(checkout), "DAGSTER_DISABLE_TELEMETRY": "1"}
    assert make(checkout) == wanted
    file = checkout / ".env"
    before = file.read_text()
    assert make(checkout) == wanted
    assert file.read_text() == before
    file.write_text("DAGSTER_HOME=${PWD}\nDAGSTER_DISABLE_TELEMETRY=1\n")  # as earlier checkouts have it
    assert make(checkout) == wanted


def test_an_environment_is_made_again_once_after_a_change_of_the_lock(checkout):
    for name in ("requirements.lock", "pyproject.toml", ".python-version", ".venv/bin/python"):
        (checkout / name).parent.mkdir(parents=True, exist_ok=True)
        (checkout / name).write_text("#!/bin/sh\n")
        (checkout / name).chmod(0o755)
    stamp = checkout / ".venv/.installed"
    stamp.touch()
    os.utime(stamp, (0, 0))

    def stale() -> int:
        return subprocess.run(["make", "-q", "UV=true", stamp.relative_to(checkout)], cwd=checkout).returncode

    assert stale() == 1
    subprocess.run(["make", "-s", "UV=true", stamp.relative_to(checkout)], cwd=checkout, check=True)
    assert stale() == 0


def test_a_checkout_that_moved_is_found_again(checkout):
    make(checkout)
    moved = checkout.rename(checkout.parent / "moved")
    assert make(moved)["DAGSTER_HOME"] == str(moved)


def test_other_settings_stay_and_so_does_a_home_of_somebodys_own(checkout):
    (checkout / ".env").write_text("WANDB_API_KEY=k\n")
    assert make(checkout) == {"WANDB_API_KEY": "k", "DAGSTER_HOME": str(checkout)}
    (checkout / ".env").write_text("DAGSTER_HOME=/srv/dagster\n")
    assert make(checkout) == {"DAGSTER_HOME": "/srv/dagster"}


def test_every_target_that_starts_dagster_sees_to_the_file_and_git_ignores_it():
    makefile = (ROOT / "Makefile").read_text()
    for target in ("setup", "ladder", "ui", "test"):
        (rule,) = [line for line in makefile.splitlines() if line.startswith(f"{target}:")]
        assert ".env" in rule.partition("#")[0].split(), rule
    assert "/.env" in (ROOT / ".gitignore").read_text().splitlines()


@pytest.mark.parametrize("stale", ["another directory", "no PWD"])
def test_a_command_in_the_root_uses_the_instance_of_the_root_whatever_pwd_says(
    checkout, tmp_path, stale, forks
):
    make(checkout)
    other = tmp_path / "other"
    other.mkdir()
    left_out = ("PWD", "DAGSTER_HOME")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    if stale == "another directory":
        environment["PWD"] = str(other)
    environment |= {"PYTHONPATH": str(ROOT), "RAN": str(tmp_path / "ran")}
    command = ["asset", "materialize", "-m", "tests.guarded_definitions", "--select", "tiny/synth"]
    if stale == "another directory":  # the installed program itself
        subprocess.run(
            [BIN / "dagster", *command], cwd=checkout, env=environment, capture_output=True, check=True
        )
    else:
        done = forks.run(["-m", "dagster", *command], environment=environment, directory=checkout)
        assert done.returncode == 0, done.stderr
    assert list(other.iterdir()) == []
    assert {path.name for path in checkout.iterdir()} == {"Makefile", "dagster.yaml", ".env", ".dagster"}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(checkout)
        with dg.DagsterInstance.from_config(str(checkout)) as instance:
            assert len(instance.get_runs()) == 1
