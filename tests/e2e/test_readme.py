"""What the README tells people to type exists and is understood; nothing is run."""

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path

import click
import dagster as dg
import pytest

from trainer.__main__ import build_parser
from vpmoe_assets.cli import main
from vpmoe_assets.resources.trainer import TrainerResource

ROOT = Path(__file__).resolve().parents[2]
README = (ROOT / "README.md").read_text()


def commands(text: str) -> Iterator[list[str]]:
    """The command lines of fenced shell blocks, continued lines joined and comments gone."""
    for block in re.findall(r"^```(?:sh|bash|console)\n(.*?)^```", text, re.M | re.S):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                yield words


LINES = list(commands(README))


def of(*program: str) -> list[list[str]]:
    """Arguments of every command line that starts with these words."""
    return [words[len(program) :] for words in LINES if tuple(words[: len(program)]) == program]


def identified(words: list[str]) -> str:
    return " ".join(words)


def test_every_kind_of_command_is_shown():
    assert of("make")
    assert of("vpmoe")
    assert of("dagster", "asset", "materialize")
    known = {"make", "vpmoe", "dagster", "dg", "python", ".", "source", "cd", "git"}
    assert {words[0] for words in LINES} - known == set(), "teach this test about the new program"


def test_the_make_targets_exist_and_say_what_they_do():
    makefile = (ROOT / "Makefile").read_text()
    documented = set(re.findall(r"^([\w-]+):.*## ", makefile, re.M))
    shown = {target for words in of("make") for target in words}
    assert {"ladder", "test"} <= shown <= documented
    (also,) = re.findall(r"`make help` lists the other targets: (.*?)\.\n", README, re.S)
    assert set(re.findall(r"`([\w-]+)`", also)) <= documented


def test_ci_runs_the_test_commands_of_the_readme():
    lines = [line for line in (ROOT / ".ci" / "run").read_text().splitlines() if line.startswith("make")]
    assert lines == ["make test", "make test-services"]
    assert all(line.split()[1:] in of("make") for line in lines)


@pytest.mark.parametrize("words", of("vpmoe"), ids=identified)
def test_the_vpmoe_commands_parse(words):
    command: click.Command = main
    name, rest = "vpmoe", list(words)
    while isinstance(command, click.Group):
        name, command, rest = command.resolve_command(click.Context(command), rest)
    command.make_context(name, rest)


@pytest.mark.parametrize("words", of("dagster", "asset", "materialize"), ids=identified)
def test_the_selections_and_the_configuration_are_valid(words, monkeypatch):
    monkeypatch.delenv("VPMOE_EXPERIMENT", raising=False)
    options = dict(zip(words[::2], words[1::2], strict=True))
    definitions: dg.Definitions = runpy.run_module(options.pop("-m"))["defs"]
    selection = dg.AssetSelection.from_string(options.pop("--select"))
    assert selection.resolve(definitions.resolve_asset_graph())
    given = json.loads(options.pop("--config-json", "{}"))
    for name, resource in given.pop("resources", {}).items():
        assert isinstance((definitions.resources or {})[name], TrainerResource)
        TrainerResource(**resource["config"])
    assert not given
    assert not options


@pytest.mark.parametrize("words", of("python", "-m", "trainer"), ids=identified)
def test_the_trainers_commands_parse(words):
    assert build_parser().parse_args(words).run


def test_the_pages_that_it_links_to_exist():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert [link for link in links if not (ROOT / link).exists()] == []
