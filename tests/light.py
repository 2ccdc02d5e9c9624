"""Serves forks of a process that has imported what the `--help` of a light command does, and nothing else.

What such a command loads when it runs, and what becomes of its streams, is seen without starting a Python.
"""

import importlib
import sys

from tests.forks import serve

MAINS = ("vpmoe_assets.cli", "trainer.__main__")

if __name__ == "__main__":
    for name in MAINS:
        importlib.import_module(name)
    for name in MAINS:  # a program's own module is `__main__` alone
        del sys.modules[name]
    serve(sys.argv[1])
