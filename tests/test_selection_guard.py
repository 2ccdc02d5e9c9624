"""What Dagster's commands run for a selection; fails with a Dagster whose commands pass the guard by."""

import multiprocessing
import os
import shutil
from multiprocessing.connection import Connection
from pathlib import Path
from typing import NamedTuple

import click
import dagster as dg
import pytest
from click.testing import CliRunner
from dagster._cli.asset import asset_materialize_command
from dagster._cli.job import job_execute_command
from dagster_dg_cli.cli import cli as dg_commands

from tests import guarded_definitions
from vpmoe_assets import selection_guard

LOCATION = ("-m", "tests.guarded_definitions")
ALL = ["eval_a", "eval_b", "kd", "synth"]


FORK = multiprocessing.get_context("fork")  # everything is imported already


class Said(NamedTuple):
    exit_code: int
    output: str


def _run(answer: Connection, home: Path, command: click.Command, arguments: list[str]) -> None:
    os.chdir(home)
    os.environ.update(DAGSTER_HOME=str(home), RAN=str(home / "ran"))
    result = CliRunner().invoke(command, arguments)
    answer.send(Said(result.exit_code, result.output))


class Site:
    """A Dagster home, and the commands run in it."""

    def __init__(self, home: Path) -> None:
        self.home, self.ran_file = home, home / "ran"
        self.ran_file.touch()
        (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

    def run(self, command: click.Command, *arguments: str) -> Said:
        """Run a command in a process of its own: it moves streams and loggers of the one that it runs in."""
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=_run, args=(theirs, self.home, command, [*arguments, *LOCATION]))
        process.start()
        said: Said = ours.recv()
        process.join()
        return said

    def materialize(self, selection: str) -> Said:
        return self.run(asset_materialize_command, "--select", selection)

    def launch(self, selection: str) -> Said:
        return self.run(dg_commands, "launch", "--assets", selection)

    def ran(self) -> list[str]:
        return sorted(self.ran_file.read_text().split())


@pytest.fixture(scope="module")
def untouched(tmp_path_factory: pytest.TempPathFactory) -> Site:
    """Where nothing may run: whoever is refused there leaves it to the next."""
    return Site(tmp_path_factory.mktemp("untouched"))


@pytest.fixture(scope="module")
def instance(untouched: Site) -> Path:
    """The home with the tables of its instance, which take a second to make."""
    assert untouched.materialize("kind:nope").exit_code == 1
    return untouched.home


@pytest.fixture
def site(instance: Path, tmp_path: Path) -> Site:
    return Site(Path(shutil.copytree(instance, tmp_path / "home")))


NEAREST = 'The nearest key is "tiny/synth".'
REFUSED = {
    'key:"tiny/syntt"': ('key:"tiny/syntt" matches no asset', NEAREST),
    'key:"tiny/syntt",key:"tiny/synth"': ('key:"tiny/syntt" matches no asset', NEAREST),
    'key:"tiny/synth",group:nope': ('group:"nope" matches no asset',),
    'key:"tiny/synth" or key:"tiny/kdd"': ('key:"tiny/kdd" matches no asset',),
    'key:"tiny/synth" and kind:nope': ('kind:"nope" matches no asset',),
    "group:sources and group:data": ('group:"sources" and group:"data" matches no asset',),
    'not key:"tiny/syntt"': ('key:"tiny/syntt" matches no asset',),
    "group:evals and not group:evals": ("matches no asset",),
    'key:"tini/kd"+': ('key:"tini/kd" matches no asset', 'The nearest key is "tiny/kd".'),
    '+key:"tiny/kdd"': ('key:"tiny/kdd" matches no asset',),
    'sinks(key:"tini/*")': ('key:"tini/*" matches no asset',),
    "group:sorces": ('The nearest group is "sources".',),
    "kind:jsn": ('The nearest kind is "json".',),
    "tag:no=such": ('tag:"no"="such" matches no asset', "`dagster asset list`"),
}
"""What is said, the nearest that there is included."""
LAUNCHED = ('key:"tiny/syntt"', "group:sources and group:data", 'key:"tini/kd"+')
"""What `dg launch` is asked too: it comes to the same guard by a way of its own."""


@pytest.mark.parametrize("selection", REFUSED)
def test_a_selection_with_a_part_that_matches_nothing_is_refused_and_nothing_runs(untouched, selection):
    for command in (untouched.materialize, untouched.launch)[: 1 + (selection in LAUNCHED)]:
        refused = command(selection)
        assert refused.exit_code == 1
        assert all(part in refused.output for part in REFUSED[selection])
        assert untouched.ran() == []


@pytest.mark.parametrize("selection", ["tiny/syntt", "+tiny/syntt", "synth", "tiny/synth,tiny/kdd"])
def test_bare_keys_that_do_not_exist_are_refused_by_dagster_itself(untouched, selection):
    for command in (untouched.materialize, untouched.launch):
        assert command(selection).exit_code == 1
        assert untouched.ran() == []


def test_an_empty_selection_runs_nothing(untouched):
    assert untouched.materialize("").exit_code == 1
    untouched.launch("")
    assert untouched.ran() == []


WORKS = {
    "*": ALL,
    "tiny/synth": ["synth"],
    "+tiny/kd": ["kd", "synth"],
    "tiny/kd+": ["eval_a", "eval_b", "kd"],
    "tiny/eval_b": ["eval_b"],
    "tiny/synth,tiny/kd": ["kd", "synth"],
    'key:"tiny/eval_*"': ["eval_a", "eval_b"],
    "group:evals and not key:*_b": ["eval_a"],
    "not group:evals": ["kd", "synth"],
    "roots(*)": ["synth"],
    'kind:"json" or group:data': ["kd", "synth"],
}


@pytest.mark.parametrize("selection", WORKS)
def test_a_selection_whose_parts_all_match_runs_what_it_says(site, selection):
    done = site.materialize(selection)
    assert done.exit_code == 0, done.output
    assert site.ran() == WORKS[selection]


def test_dg_launch_runs_what_is_selected_too(site):
    done = site.launch("+tiny/kd")
    assert done.exit_code == 0, done.output
    assert site.ran() == ["kd", "synth"]


def test_jobs_run_as_before(site):
    assert site.run(job_execute_command, "-j", "sources").exit_code == 0
    assert site.ran() == ["synth"]


def test_whoever_asks_outside_a_command_is_answered_as_before():
    repository = guarded_definitions.defs.get_repository_def()
    for keys in ([], [dg.AssetKey(["tiny", "kd"])]):  # a sensor that asks for checks alone names no asset
        job = repository.get_implicit_job_def_for_assets(keys)
        assert job is repository.get_implicit_global_asset_job_def()


def test_checks_alone_and_the_whole_graph_are_launched_by_key_without_asking(tmp_path, monkeypatch):
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    job = guarded_definitions.defs.resolve_implicit_global_asset_job_def()
    check = dg.AssetCheckKey(dg.AssetKey(["tiny", "kd"]), "readable")
    checked = job.get_subset(asset_check_selection={check}).execute_in_process()
    assert [item.check_name for item in checked.get_asset_check_evaluations()] == ["readable"]
    assert not (tmp_path / "ran").exists()
    assert job.execute_in_process().success
    assert sorted((tmp_path / "ran").read_text().split()) == ALL


def test_a_dagster_without_the_guarded_method_fails_as_the_code_location_loads(monkeypatch):
    monkeypatch.delattr(dg.RepositoryDefinition, "get_implicit_job_def_for_assets")
    with pytest.raises(AttributeError, match="get_implicit_job_def_for_assets"):
        selection_guard.install()


def test_the_code_location_of_this_project_is_guarded():
    text = (Path(selection_guard.__file__).parent / "definitions.py").read_text()
    assert "\nguard_selections()\n" in text
