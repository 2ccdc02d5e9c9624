"""`vpmoe new`: an experiment that states only what differs from another one."""

import re
import tomllib
from pathlib import Path
from typing import Any

import click

from vpmoe_assets import project
from vpmoe_assets.commands.common import json_option, print_json, user_errors

_NAME = re.compile(r"[a-z0-9][a-z0-9_]*")
_KEY = re.compile(r"[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*")


@click.command()
@click.argument("name", metavar="EXPERIMENT")
@click.option("--from", "base", default="smoke", show_default=True, metavar="NAME", help="What it extends.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="A key that differs, by its full path, with its value as in TOML; may be repeated.",
)
@json_option
def new(name: str, base: str, settings: tuple[str, ...], as_json: bool) -> None:
    """Start configs/EXPERIMENT.toml from another experiment, with only what differs.

    The file says `extends = "…"`: every key that is not in it is taken from there, now and later. Records
    hold the experiment resolved, as if it had been written out. What both make alike is made once.

    \b
    Examples:
      vpmoe new longer --set stages.vpmoe_stage1.steps=16
      vpmoe new wide --from full --set rungs.vpmoe.moe.topk=4
    """  # noqa: D301
    if not _NAME.fullmatch(name):
        raise click.ClickException(f"{name!r} is no name for an experiment: use a-z, 0-9 and _")
    target = directory() / f"{name}.toml"
    if target.exists():
        raise click.ClickException(f"{target} is there already; choose another name, or edit it")
    text = _text(name, base, settings)
    _require_valid(text)
    target.write_text(text, encoding="utf-8")
    if as_json:
        print_json({"experiment": name, "extends": base, "file": str(target), "set": list(settings)})
        return
    click.echo(f"{target} extends {base}; edit it, then: vpmoe plan -e {name}")


def directory() -> Path:
    """Return where experiments lie."""
    return project.ROOT / "configs"


def _text(name: str, base: str, settings: tuple[str, ...]) -> str:
    lines = [
        f"# What differs from {base}; every other key is taken from there. Tables are merged key by key;",
        "# one of another `kind` replaces the whole table.",
        f'extends = "{base}"',
        f'name = "{name}"',
    ]
    values: dict[str, Any] = {}
    for setting in settings:
        key, equals, value = setting.partition("=")
        key = key.strip()
        if not equals or not _KEY.fullmatch(key):
            raise click.ClickException(f"--set {setting}: expected KEY=VALUE, such as training.clip_grad=0.5")
        if key in values or key in ("name", "extends"):
            raise click.ClickException(f"--set {key}: it is set already")
        values[key] = _parsed(key, value.strip())
        lines.append(f"{key} = {value.strip()}")
    return "\n".join(lines) + "\n"


def _parsed(key: str, value: str) -> Any:
    try:
        found = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        found = {}
    if list(found) != ["value"] or "\n" in value:
        raise click.ClickException(
            f"--set {key}={value}: no value of TOML; a text is quoted for TOML and for the shell, as in "
            f"'{key}=\"text\"'"
        )
    return found["value"]


def _require_valid(text: str) -> None:
    """Refuse an experiment that cannot be used as written, before there is a file."""
    import tempfile

    from trainer.contract.schema.base import ConfigError
    from trainer.contract.schema.experiment import load_experiment

    with tempfile.TemporaryDirectory() as place, user_errors(ConfigError):
        draft = Path(place) / "new.toml"
        draft.write_text(text, encoding="utf-8")
        load_experiment(draft)
