"""The verbs of `vpmoe`, found by listing them, and what each is given."""

from collections.abc import Iterator

import click

from vpmoe_assets.cli import main

GIVEN = {"asset": ["synth"], "statement": ["SELECT * FROM latest"], "first": ["synth"]}
"""What a verb's required parameters are given, by their name."""
ALSO = {
    ("accept",): ["--list"],
    ("browse",): ["--port", "0", "--until-idle", "0.05"],
    ("diff",): ["synth"],
    ("report-events",): ["-e", "nonesuch"],
}
"""And what a verb that does several things is asked for, beyond its required parameters."""
SERVES = {"browse"}
"""Verbs that serve until they are told to end: they always are told."""
RUNS = {("make",)}
"""Verbs that start a run of Dagster's: only `--help` is asked of them, too."""
MAKERS = {"name", "inputs", "output", "because", "directory", "key"}
"""Required by verbs that only `--help` is asked of: they make or state things."""


def verbs(
    group: click.Group = main, path: tuple[str, ...] = ()
) -> Iterator[tuple[tuple[str, ...], click.Command]]:
    """All commands that are no groups."""
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            yield from verbs(command, (*path, name))
        else:
            yield (*path, name), command


VERBS = dict(verbs())
