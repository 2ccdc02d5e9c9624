"""Fixtures that every package's tests may use."""

import gc
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

from tests.forks import SELDOM, forks, light_forks, read_migrations_once, wait_for_no_disk  # noqa: F401 - fixtures
from tests.workers import fork_workers

ROOT = Path(__file__).resolve().parent.parent

# torch.compile on a CPU runs a C++ compiler for every fused function: ten times slower, and no test needs it.
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
# Triton decides when it is imported whether it interprets kernels; without a GPU it can do nothing else.
GPU = Path("/dev/nvidiactl").exists()
if not GPU:
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("DAGSTER_DISABLE_TELEMETRY", "1")
os.environ.setdefault("WANDB_MODE", "offline")
# Jobs of tests are forks already, of `tests.forks`; what the product forks has its own, `test_warm`.
os.environ.setdefault("VPMOE_WARM_START", "0")
# One thread, whatever a fixture's scope and whichever process: bits are compared, and on some CPUs they
# depend on the number of threads. Two workers share two cores besides.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where a machine asks for no bytecode, every worker would write the assertions of every test anew, and every
# process of a test would compile this project.
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
sys.dont_write_bytecode = False

wait_for_no_disk()

# How long an example takes says more of what else the machine has to do.
settings.register_profile("busy", deadline=None)
settings.load_profile("busy")

# A suite that a shell started in the background inherits ignored interrupts, and so would every process that
# the tests start and interrupt.
if (
    threading.current_thread() is threading.main_thread()
    and signal.getsignal(signal.SIGINT) == signal.SIG_IGN
):
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_configure() -> None:
    """Leave what the tests import alone, which lives as long as they do.

    Looked through by the collector again and again while it is being imported, it takes a third longer;
    frozen, no collection looks at it afterwards.
    """
    gc.disable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtestloop(session: pytest.Session) -> None:
    if "dagster._core.storage.sql" in sys.modules and not session.config.option.collectonly:
        read_migrations_once()
    gc.freeze()
    gc.set_threshold(*SELDOM)
    gc.enable()
    if "tests.ranks" in sys.modules and not session.config.option.collectonly and not GPU:
        sys.modules["tests.ranks"].start_server()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_setupnodes(config: pytest.Config, specs: list[Any]) -> None:
    if not GPU:  # CUDA, which tests ask for when they are imported, is no use in a fork
        fork_workers(config, specs)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Modules with slow tests come first: workers take whole modules, and none is left with a long one.

    Tests of services run where they are asked for, by `-m services`.
    """
    if "services" not in (config.option.markexpr or ""):
        apart = [item for item in items if item.get_closest_marker("services")]
        if apart:
            config.hook.pytest_deselected(items=apart)
            items[:] = [item for item in items if item not in apart]
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    """Say where the tests are that were not asked for."""
    if "services" not in (config.option.markexpr or "") and not config.option.file_or_dir:
        terminalreporter.write_line("tests of Slurm and PostgreSQL are apart: `make test-services`")


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The development data beside the checkout; tests that need it are skipped, out loud, without it."""
    path = ROOT.parent / "shared" / "data"
    if not path.is_dir():
        pytest.skip(f"development data not found at {path}: real-row checks did not run")
    return path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of one artifact, indexed, which remembers what makes the assets: enough for every verb."""
    from tests.lineage.fabricate import publish
    from vpmoe_assets.commands.present import present_of
    from vpmoe_assets.lineage.index import Index
    from vpmoe_assets.lineage.store import Store

    root = tmp_path_factory.mktemp("light") / "artifacts"
    store = Store(root)
    publish(store, "synth", metrics={"rows": 12})
    Index(root / "index.duckdb").rebuild(store)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VPMOE_ARTIFACTS", str(root))
        present_of("smoke")
    return root
