"""What Dagster's commands run for a selection; fails with a Dagster whose commands pass the guard by."""

import multiprocessing
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


def _run(answer: Connection, command: click.Command, arguments: list[str]) -> None:
    result = CliRunner().invoke(command, arguments)
    answer.send(Said(result.exit_code, result.output))


class Site:
    """A Dagster home, and the commands run in it."""

    def __init__(self, home: Path) -> None:
        self.ran_file = home / "ran"
        self.ran_file.touch()
        (home / "dagster.yaml").write_text("telemetry: {enabled: false}\n")

    def run(self, command: click.Command, *arguments: str) -> Said:
        """Run a command in a process of its own: it moves streams and loggers of the one that it runs in."""
        ours, theirs = FORK.Pipe()
        process = FORK.Process(target=_run, args=(theirs, command, [*arguments, *LOCATION]))
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


@pytest.fixture
def site(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", str(tmp_path))
    monkeypatch.setenv("RAN", str(tmp_path / "ran"))
    return Site(tmp_path)


REFUSED = {
    'key:"tiny/syntt"': 'key:"tiny/syntt" matches no asset',
    'key:"tiny/syntt",key:"tiny/synth"': 'key:"tiny/syntt" matches no asset',
    'key:"tiny/synth",group:nope': 'group:"nope" matches no asset',
    'key:"tiny/synth" or key:"tiny/kdd"': 'key:"tiny/kdd" matches no asset',
    'key:"tiny/synth" and kind:nope': 'kind:"nope" matches no asset',
    "group:sources and group:data": 'group:"sources" and group:"data" matches no asset',
    'not key:"tiny/syntt"': 'key:"tiny/syntt" matches no asset',
    "group:evals and not group:evals": "matches no asset",
    'key:"tini/kd"+': 'key:"tini/kd" matches no asset',
    '+key:"tiny/kdd"': 'key:"tiny/kdd" matches no asset',
    'sinks(key:"tini/*")': 'key:"tini/*" matches no asset',
    "kind:nope": 'kind:"nope" matches no asset',
    "tag:no=such": 'tag:"no"="such" matches no asset',
}


@pytest.mark.parametrize("selection", REFUSED)
def test_a_selection_with_a_part_that_matches_nothing_is_refused_and_nothing_runs(site, selection):
    for command in (site.materialize, site.launch):
        refused = command(selection)
        assert refused.exit_code == 1
        assert REFUSED[selection] in refused.output
        assert site.ran() == []


@pytest.mark.parametrize(
    ("selection", "nearest"),
    [
        ('key:"tiny/syntt"', 'The nearest key is "tiny/synth".'),
        ('key:"tini/kd"+', 'The nearest key is "tiny/kd".'),
        ("group:sorces", 'The nearest group is "sources".'),
        ("kind:jsn", 'The nearest kind is "json".'),
        ("tag:no=such", "`dagster asset list`"),
    ],
)
def test_the_message_names_the_nearest_that_there_is(site, selection, nearest):
    assert nearest in site.materialize(selection).output


@pytest.mark.parametrize("selection", ["tiny/syntt", "+tiny/syntt", "synth", "tiny/synth,tiny/kdd"])
def test_bare_keys_that_do_not_exist_are_refused_by_dagster_itself(site, selection):
    for command in (site.materialize, site.launch):
        assert command(selection).exit_code == 1
        assert site.ran() == []


def test_an_empty_selection_runs_nothing(site):
    assert site.materialize("").exit_code == 1
    site.launch("")
    assert site.ran() == []


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
