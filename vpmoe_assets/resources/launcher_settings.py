"""What is set of a launcher: `launchers.toml`, a table `[launcher.<name>]` each, and what a run asks for."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.schema.base import ConfigError, Frozen, parse
from vpmoe_assets.project import ROOT

FILE_ENV = "VPMOE_LAUNCHERS"
FILE_NAME = "launchers.toml"


def settings_of[S: Frozen](
    name: str, model: type[S], asked: Mapping[str, Any], environment: Mapping[str, str]
) -> S:
    """Return the settings of a launcher.

    Args:
        name: Of the launcher.
        model: Its table.
        asked: What a run asks for, by key; it comes before what the file says.
        environment: `VPMOE_LAUNCHERS` names the file; by default it is `launchers.toml` in the project's
            root, and need not be there.

    Raises:
        ConfigError: The file is not there though it was named, cannot be read, or has a wrong key or value.
    """
    named = environment.get(FILE_ENV)
    path = Path(named) if named else ROOT / FILE_NAME
    try:
        content = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        if named:
            raise ConfigError(f"{FILE_ENV} = {named}: there is no such file") from None
        content = {}
    except (OSError, ValueError, RecursionError) as error:
        raise ConfigError(f"{path}: {error}") from error
    tables = content.get("launcher", {})
    if content.keys() - {"launcher"} or not isinstance(tables, dict):
        raise ConfigError(f"{path}: it holds tables [launcher.<name>] and nothing else")
    table = tables.get(name, {})
    if not isinstance(table, dict):
        raise ConfigError(f"{path}: launcher.{name} is no table")
    return parse(model, {**table, **asked}, origin=f"{path}, [launcher.{name}]")
