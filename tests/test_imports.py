"""The code location and the command load in a blink: whatever is heavy waits until it is needed."""

import ast
import os
import re
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.forks import Forks
from tests.verbs import ALSO, GIVEN, MAKERS, RUNS, VERBS

ROOT = Path(__file__).resolve().parent.parent
HEAVY = ("torch", "megatron", "transformers", "ray", "wandb", "mergekit", "datasets", "matplotlib", "duckdb")


def python(*arguments: str) -> tuple[str, float]:
    """Run Python; return what it says on standard error, and its CPU time in seconds."""
    before, started = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    done = subprocess.run([sys.executable, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = (after.ru_utime + after.ru_stime) - (before.ru_utime + before.ru_stime)
    print(f"\n{arguments[-1]}: {seconds:.2f} s of CPU, {time.perf_counter() - started:.2f} s")
    return done.stderr, seconds


def loaded_by(statement: str) -> set[str]:
    """Return the top-level packages that a statement loads."""
    said, _ = python("-X", "importtime", "-c", statement)
    names = re.findall(r"^import time:[\s\d|]+\|\s+(\S+)$", said, re.MULTILINE)
    assert "encodings" in names
    return {name.partition(".")[0] for name in names}


def test_the_definitions_load_nothing_heavy():
    packages = loaded_by("import vpmoe_assets.definitions")
    assert "dagster" in packages
    assert not packages.intersection(HEAVY)


def test_the_definitions_load_in_under_four_seconds():
    """Where the machine is so busy that Dagster alone takes most of that, what we add to it still counts."""
    _, seconds = python("-c", "import vpmoe_assets.definitions")
    if seconds >= 4:
        _, alone = python("-c", "import dagster")
        _, seconds = python("-c", "import vpmoe_assets.definitions")
        assert seconds < max(4.0, 1.5 * alone)


@pytest.mark.parametrize("module", ["vpmoe_assets.cli", "trainer.contract.schema.experiment"])
def test_the_command_and_the_schema_load_without_dagster(module):
    packages = loaded_by(f"import {module}")
    assert module.partition(".")[0] in packages
    assert not packages.intersection({*HEAVY, "dagster", "pyarrow"})


LIGHT = (
    "torch",
    "megatron",
    "dagster",
    "transformers",
    "wandb",
    "ray",
    "numpy",
    "pandas",
    "matplotlib",
    "rich",
)
"""What no verb loads that reads the store, and neither `trainer --help` nor `trainer count`."""
MAY_LOAD = {
    ("sql",): {"duckdb"},
    ("verify",): {"duckdb"},
    ("index", "rebuild"): {"duckdb", "numpy", "pandas", "pyarrow"},
}
"""What a verb needs beyond that."""


def loaded_in_run(forks: Forks, module: str, *arguments: str, artifacts: Path | None = None) -> set[str]:
    """Return the top-level packages that `python -m module …` has loaded when it ends."""
    program = (
        "import atexit, os, runpy, sys\n"
        "atexit.register(setattr, os, '_exit', os._exit)\n"
        "os._exit = lambda code: None\n"  # a job that ends at once would not come to the line below
        "names = lambda: {name.partition('.')[0] for name in sys.modules}\n"
        "atexit.register(lambda: print('loaded:', *names(), file=sys.stderr))\n"
        f"sys.argv = ['x', *{list(arguments)!r}]\n"
        f"runpy.run_module({module!r}, run_name='__main__')\n"
    )
    environment = os.environ | ({"VPMOE_ARTIFACTS": str(artifacts)} if artifacts else {})
    done = forks.run(["-c", program], environment=environment, directory=ROOT)
    last = done.stderr.splitlines()[-1]
    assert last.startswith("loaded: "), done.stderr[-2000:]
    return set(last.split()[1:])


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_help_of_a_verb_loads_click_alone(verb, light_forks):
    packages = loaded_in_run(light_forks, "vpmoe_assets.cli", *verb, "--help")
    assert "click" in packages
    assert not packages.intersection({*LIGHT, *HEAVY, "pydantic", "pyarrow", "psutil"})


@pytest.mark.parametrize("verb", VERBS, ids=" ".join)
def test_a_verb_loads_what_it_needs(verb, artifacts, light_forks):
    required = [parameter.name for parameter in VERBS[verb].params if parameter.required]
    if verb in RUNS or MAKERS.intersection(required):
        pytest.skip("it makes things, with pyarrow and what else that takes")
    arguments = [*ALSO.get(verb, ()), *(text for name in required for text in GIVEN[name])]
    packages = loaded_in_run(light_forks, "vpmoe_assets.cli", *verb, *arguments, artifacts=artifacts)
    assert "vpmoe_assets" in packages
    heavy = {*LIGHT, *HEAVY, "pyarrow"} - MAY_LOAD.get(verb, set())
    assert not packages.intersection(heavy)


@pytest.mark.parametrize(
    "arguments", [["--help"], ["count", "--help"], ["train", "--help"], ["generate", "--help"]]
)
def test_help_of_the_trainer_loads_the_standard_library_alone(arguments, light_forks):
    packages = loaded_in_run(light_forks, "trainer", *arguments)
    assert "trainer" in packages
    assert not packages.intersection({*LIGHT, *HEAVY, "pydantic", "safetensors", "psutil"})


def test_count_loads_the_schema_and_no_more(light_forks):
    packages = loaded_in_run(light_forks, "trainer", "count", "full", "--json")
    assert "pydantic" in packages
    assert not packages.intersection({*LIGHT, *HEAVY})


def test_the_contract_loads_neither_torch_nor_dagster_nor_the_rest_of_the_trainer():
    modules = sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts)
        for file in (ROOT / "trainer" / "contract").rglob("*.py")
        if file.name != "__init__.py"
    )
    packages = {".".join(module.split(".")[:-1]) for module in modules}
    program = f"import importlib, sys; [importlib.import_module(m) for m in {modules!r}]; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    loaded = set(done.stdout.split())
    assert set(modules) <= loaded
    assert not {name.partition(".")[0] for name in loaded}.intersection({*HEAVY, "dagster", "vpmoe_assets"})
    ours = {name for name in loaded if name.startswith("trainer.")}
    assert ours == {*packages, *modules}


@cache
def parsed(file: Path) -> tuple[list[ast.stmt], list[ast.Import | ast.ImportFrom]]:
    """Return the statements of a module, and the imports anywhere in it."""
    tree = ast.parse(file.read_text())
    return tree.body, [node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom)]


def imports_of(package: str) -> dict[str, set[str]]:
    """For each file of a package, the modules that it imports anywhere in it."""
    found: dict[str, set[str]] = {}
    for file in sorted((ROOT / package).rglob("*.py")):
        names = found.setdefault(file.relative_to(ROOT).as_posix(), set())
        for node in parsed(file)[1]:
            if isinstance(node, ast.Import):
                names |= {alias.name for alias in node.names}
            elif node.module:
                names.add(node.module)
    return found


def test_the_two_packages_meet_in_files_and_in_the_contract_alone():
    trainer, assets = imports_of("trainer"), imports_of("vpmoe_assets")
    assert any("torch" in names for names in trainer.values())
    for file, names in trainer.items():
        assert not {name for name in names if re.match(r"(dagster|vpmoe_assets)\b", name)}, file
    for file, names in assets.items():
        others = {name for name in names if re.match(r"trainer\b(?!\.contract\.)", name)}
        assert not others, f"{file} imports {others}: only trainer.contract is shared"


PRODUCT = ("trainer", "vpmoe_assets")


def test_packages_export_nothing():
    """Whoever imports one module of a package loads that module, and its fingerprint hashes no other."""
    for package in PRODUCT:
        for file in sorted((ROOT / package).rglob("__init__.py")):
            first, *others = parsed(file)[0]
            assert isinstance(first, ast.Expr), file
            assert isinstance(first.value, ast.Constant), file
            if file != ROOT / "trainer" / "model" / "__init__.py":  # it quietens megatron-core, no more
                assert not others, file
            names = [name for node in others for name in bound_by(node)]
            assert set(names) <= {"logging", "warnings"}, file


def bound_by(statement: ast.stmt) -> Iterator[str]:
    """Names that a statement of a module gives it."""
    if isinstance(statement, ast.Import | ast.ImportFrom):
        yield from ((alias.asname or alias.name).partition(".")[0] for alias in statement.names)
    elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
        yield statement.name
    else:
        for node in ast.walk(statement):
            if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                yield node.id


def test_a_name_is_imported_from_the_module_that_defines_it():
    files = {
        ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): file
        for package in PRODUCT
        for file in (ROOT / package).rglob("*.py")
    }
    imported = [
        (user, node.module, alias.name)
        for user, file in files.items()
        for node in parsed(file)[1]
        if isinstance(node, ast.ImportFrom) and node.module in files
        for alias in node.names
        if f"{node.module}.{alias.name}" not in files
    ]
    assert len(imported) > 1000
    defined = {
        module: {
            name
            for node in parsed(files[module])[0]
            if not isinstance(node, ast.Import | ast.ImportFrom)
            for name in bound_by(node)
        }
        for module in {module for _, module, _ in imported}
    }
    assert not [found for found in imported if found[2] not in defined[found[1]]]
