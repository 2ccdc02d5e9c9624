"""The fork server of `tests.forks` with the orchestrator's modules imported too: `python warm.py SOCKET`.

What a fault costs is mostly programs that start: half of that is the same imports each time, reading the same
source files, and reading Dagster's migrations. A program of the orchestrator finds them done; any other, a
trainer's job above all, forgets this project's modules first, and finds its own where a new Python would.
"""

import ast
import functools
import importlib
import importlib.util
import os
import pkgutil
import sys
import types
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

ROOT = Path(__file__).resolve().parents[2]
ORCHESTRATOR = ("dagster", "dagster._daemon", "vpmoe_assets.cli")
LIBRARIES = ("vpmoe_assets.lineage", "vpmoe_assets.events", "vpmoe_assets.checks", "vpmoe_assets.codebase")
STORAGES = ("runs", "event_log", "schedules")


def main() -> None:
    forks = _forks()
    forks._load()
    _migrations()
    _sources()
    _orchestrator()
    assert "pyarrow" not in sys.modules, "it has threads, which a fork does not"
    become = forks._become

    def become_its_own(request: dict[str, Any], descriptors: Sequence[int]) -> NoReturn:
        if request["arguments"][1] not in ORCHESTRATOR:
            for name in [name for name in sys.modules if name.partition(".")[0] in forks.OURS]:
                del sys.modules[name]
        become(request, descriptors)

    forks._become = become_its_own
    forks.gc.collect()
    forks.gc.freeze()
    forks.serve(sys.argv[1])


def _forks() -> types.ModuleType:
    """Return the server's module, as the program that it is: by a name that is not one of the tests."""
    spec = importlib.util.spec_from_file_location("forks", ROOT / "tests" / "forks.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _migrations() -> None:
    """Read Dagster's migrations once: each connection asks which is the last."""
    from alembic.script import ScriptDirectory
    from dagster._core.storage.sql import get_alembic_config

    read = ScriptDirectory.from_config
    known: dict[str | None, ScriptDirectory] = {}

    def read_once(config: Any) -> ScriptDirectory:
        place = config.get_main_option("script_location")
        if place not in known:
            known[place] = read(config)
        return known[place]

    ScriptDirectory.from_config = read_once
    for storage in STORAGES:
        package = importlib.import_module(f"dagster._core.storage.{storage}.sqlite")
        assert package.__file__ is not None
        read_once(get_alembic_config(package.__file__)).as_revision_number("head")


def _sources() -> None:
    """Read this project's sources once: `vpmoe verify --deep` reads them for each record."""
    from vpmoe_assets.codebase import facts

    facts.facts_of = functools.cache(facts.facts_of)
    for top in ("trainer", "vpmoe_assets"):
        for path in sorted((ROOT / top).rglob("*.py")):
            facts.facts_of(path.read_bytes(), path.relative_to(ROOT).as_posix())


def _orchestrator() -> None:
    """Import what the code location imports, and what verbs do; the location itself is each program's own."""
    text = (ROOT / "vpmoe_assets" / "definitions.py").read_text()
    for node in ast.parse(text).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            importlib.import_module(node.module)
    importlib.import_module("vpmoe_assets.cli")
    for name in LIBRARIES:
        for found in pkgutil.iter_modules(importlib.import_module(name).__path__, f"{name}."):
            importlib.import_module(found.name)


if __name__ == "__main__":
    sys.path[:] = [entry for entry in sys.path if entry != os.path.dirname(__file__)]
    main()
