"""Loaded by every Python that has this directory in PYTHONPATH: notes which module imports which.

What is noted is every import statement that is *executed*, and every `import_module`, of this project's
modules by this project's modules; the source text is never looked at.
"""

import atexit
import builtins
import importlib
import json
import os
import sys
from pathlib import Path

PACKAGES = ("trainer", "vpmoe_assets")
imports = set()
_import, _import_module = builtins.__import__, importlib.import_module


def _ours(name):
    return name.partition(".")[0] in PACKAGES


def _noting_import(name, globals=None, locals=None, fromlist=(), level=0):  # noqa: A002 - as Python has it
    module = _import(name, globals, locals, fromlist, level)
    importer = (globals or {}).get("__name__") or ""
    if not level and _ours(name) and (_ours(importer) or importer == "__main__"):
        imports.add((importer, name))
        parts = [f"{name}.{part}" for part in fromlist or ()]
        imports.update((importer, part) for part in parts if part in sys.modules)
    return module


def _noting_import_module(name, package=None):
    module = _import_module(name, package)
    importer = sys._getframe(1).f_globals.get("__name__") or ""
    if _ours(name) and _ours(importer):
        imports.add((importer, name))
    return module


def _write():
    file = Path(os.environ["VPMOE_TEST_WITNESS"], f"{os.getpid()}.json")
    file.write_text(json.dumps(sorted(imports)))


if os.environ.get("VPMOE_TEST_WITNESS"):
    builtins.__import__ = _noting_import
    importlib.import_module = _noting_import_module
    atexit.register(_write)
