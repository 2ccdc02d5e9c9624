"""Processes of this machine: `VPMOE_WORKERS` of them, or one for each core."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from trainer.contract.schema.base import ConfigError
from vpmoe_assets.harmony.pool import Engine
from vpmoe_assets.resources.processes import Log

LAUNCHER = None


def engine(
    asked: Mapping[str, Any], scratch: Path, environment: Mapping[str, str], log: Log
) -> Engine | None:
    """Return None: nothing but the step itself is needed; see `vpmoe_assets.resources.shards`.

    Raises:
        ConfigError: Settings are given, and it has none.
    """
    if asked:
        raise ConfigError(
            f'engine_settings = {dict(asked)}: engine = "processes" has none; VPMOE_WORKERS says how many'
        )
    return None
