"""Templates, compiled once: the code lies beside Python's own, and is made again when a template changes."""

import contextlib
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from jinja2 import BytecodeCache, Environment, FileSystemLoader, StrictUndefined
from jinja2.bccache import Bucket

from trainer.contract.files import replace_bytes

TEMPLATES = Path(__file__).parent / "templates"


def environment(filters: Mapping[str, Callable[..., Any]], names: Mapping[str, Any]) -> Environment:
    """Return what makes pages of the templates.

    Args:
        filters: By name.
        names: What every template knows.
    """
    made = Environment(
        loader=FileSystemLoader(TEMPLATES),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        bytecode_cache=_Kept(TEMPLATES / "__pycache__"),
    )
    made.filters |= filters
    made.globals |= names
    return made


class _Kept(BytecodeCache):
    """Files of a directory; where it cannot be written, or Python is told to write none, nothing is kept."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def load_bytecode(self, bucket: Bucket) -> None:
        """Take what was kept of this very source, by this very version of Jinja and Python."""
        with contextlib.suppress(OSError), self._path(bucket).open("rb") as file:
            bucket.load_bytecode(file)

    def dump_bytecode(self, bucket: Bucket) -> None:
        """Keep what was compiled."""
        if sys.dont_write_bytecode:
            return
        with contextlib.suppress(OSError):
            os.makedirs(self._directory, exist_ok=True)
            replace_bytes(self._path(bucket), bucket.bytecode_to_string(), durable=False)

    def _path(self, bucket: Bucket) -> Path:
        return self._directory / f"{bucket.key}.{sys.implementation.cache_tag}.jinja"
