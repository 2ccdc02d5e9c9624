"""Workers of xdist as forks of one process that has collected the tests, so that one alone imports them.

A worker collects them again, with everything imported already, and the sources of the project parsed.
"""

import functools
import sys
from collections.abc import Sequence
from typing import Any

import pytest

from tests.forks import Forks, serve
from vpmoe_assets.codebase import memory
from vpmoe_assets.codebase.tree import SourceTree


def fork_workers(config: pytest.Config, specs: Sequence[Any]) -> None:
    """Let the workers of a run be forks.

    Args:
        config: Of the process that the workers report to.
        specs: What execnet will be asked for.
    """
    others = Forks.of(config._tmp_path_factory.getbasetemp())  # type: ignore[attr-defined]
    config.add_cleanup(others.close)
    tests = Forks(
        others.path.with_name(f"{others.path.name}-tests"), [str(others.python), "-m", __name__, *config.args]
    )
    config.add_cleanup(tests.close)
    for spec in specs:
        spec.python = str(tests.python)


def parse_sources() -> None:
    """Find out once what each source says, which takes seconds: most stores of the tests are new, and ask."""
    memory.facts_of = functools.cache(memory.facts_of)
    tree = SourceTree(memory=None)
    tree.closure([*tree.modules])


if __name__ == "__main__":
    *found, socket = sys.argv[1:]
    pytest.main([*found, "--collect-only", "--quiet", "--capture=no", "-p", "no:cacheprovider"])
    parse_sources()
    serve(socket)
