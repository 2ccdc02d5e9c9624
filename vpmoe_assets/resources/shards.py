"""What runs the shards of a step: a word, the name of a module of `engines/`. No byte depends on it."""

import importlib
import os
import pkgutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol, cast

import dagster as dg
from pydantic import Field

from trainer.contract.schema.base import ConfigError
from vpmoe_assets.errors import DataError
from vpmoe_assets.harmony.pool import Engine
from vpmoe_assets.resources.launcher import LaunchError
from vpmoe_assets.resources.processes import Log
from vpmoe_assets.resources.trainer import TrainerResource

DEFAULT = "processes"
_PACKAGE = Path(__file__).with_name("engines")


class EngineModule(Protocol):
    """A module of `engines/`.

    Attributes:
        LAUNCHER: That starts shares of a job's work there; None leaves it to the trainer's settings.
    """

    LAUNCHER: str | None

    def engine(
        self, asked: Mapping[str, Any], scratch: Path, environment: Mapping[str, str], log: Log
    ) -> Engine | None:
        """Return what runs shards, or None where processes of this machine do.

        Args:
            asked: Settings of this run, by key.
            scratch: Directory of the step that survives a crash and is never published.
            environment: Of this process.
            log: Told what happens to them.

        Raises:
            ConfigError: A setting is wrong.
            LaunchError: What it needs is not there.
        """


class ShardsResource(dg.ConfigurableResource):
    """Runs shards of data, and shares of a teacher's scores; no setting is part of what they are."""

    engine: str = Field(
        default=DEFAULT,
        description="What works on shards: processes (of this machine, $VPMOE_WORKERS of them) or ray.",
    )
    engine_settings: dict[str, Any] = Field(
        default={}, description="Of the engine, for this run, before what launchers.toml says."
    )

    def open(self, scratch: Path, log: Log) -> Engine | None:
        """Return what runs shards of a step, or None where processes of this machine do.

        Args:
            scratch: Directory of the step that survives a crash.
            log: Told what happens to them.

        Raises:
            DataError: There is no such engine, or it cannot be used; the message says why.
        """
        try:
            return self._module().engine(self.engine_settings, scratch, dict(os.environ), log)
        except (ConfigError, LaunchError) as error:
            raise DataError(f'engine = "{self.engine}": {error}') from error

    def trainer(self, trainer: TrainerResource) -> TrainerResource:
        """Return a trainer whose jobs this engine starts.

        Args:
            trainer: As the run has it.

        Raises:
            DataError: There is no such engine.
        """
        name = self._module().LAUNCHER
        if name is None:
            return trainer
        return trainer.with_settings(launcher=name, launcher_settings=self.engine_settings)

    def _module(self) -> EngineModule:
        there = available()
        if self.engine not in there:
            quoted = ", ".join(f'"{word}"' for word in there)
            raise DataError(f'engine = "{self.engine}" was asked for; available: {quoted}')
        return cast(EngineModule, importlib.import_module(f"{__package__}.{_PACKAGE.name}.{self.engine}"))


def available() -> list[str]:
    """Return the names of the engines."""
    return sorted(module.name for module in pkgutil.iter_modules([str(_PACKAGE)]))
