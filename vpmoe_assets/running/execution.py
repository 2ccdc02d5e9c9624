"""A selection executed as `dagster asset materialize` does it, with a listener in place of its console."""

import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Set
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import dagster as dg
from dagster import DagsterInstance, EventLogEntry
from dagster._cli.utils import get_possibly_temporary_instance_for_cli
from dagster._cli.workspace.cli_target import get_repository_python_origin_from_cli_opts
from dagster._core.execution.api import execute_run
from dagster._core.origin import JobPythonOrigin, RepositoryPythonOrigin
from dagster._utils.hosted_user_process import recon_job_from_origin, recon_repository_from_origin
from dagster._utils.interrupts import capture_interrupts
from dagster_shared.cli import PythonPointerOpts

from vpmoe_assets.resources.instances import require_lasting


@dataclass(frozen=True)
class Location:
    """A code location that was loaded, and how it is loaded again."""

    origin: RepositoryPythonOrigin
    repository: dg.RepositoryDefinition


@dataclass(frozen=True)
class Ran:
    """How a run ended.

    Attributes:
        run_id: Dagster's.
        success: Whether every asset was made and no blocking check failed.
    """

    run_id: str
    success: bool


@contextmanager
def instance_of_commands() -> Iterator[DagsterInstance]:
    """Open the instance that Dagster's own commands would use here, `.env` read.

    Raises:
        MisplacedInstanceError: What a run would leave in it would not be found again.
    """
    with get_possibly_temporary_instance_for_cli("`vpmoe make`") as instance:
        require_lasting(instance)
        yield instance


def open_location(module: str) -> Location:
    """Load a code location as Dagster's commands do."""
    origin = get_repository_python_origin_from_cli_opts(PythonPointerOpts(module_name=module))
    return Location(origin, recon_repository_from_origin(origin).get_definition())


def run(
    instance: DagsterInstance,
    location: Location,
    keys: Set[dg.AssetKey],
    run_config: Mapping[str, Any],
    listener: Callable[[EventLogEntry], None],
) -> Ran:
    """Materialise assets in a run of this process.

    An interrupt or SIGTERM cancels it: a job at work is told to write a checkpoint and to end.

    Args:
        instance: That records the run.
        location: The code location.
        keys: What is to be made; not empty, for Dagster takes that for everything.
        run_config: Dagster's.
        listener: Told every event of the run, in this thread.
    """
    if not keys:
        raise ValueError("no assets to make")
    with capture_interrupts():
        implicit = location.repository.get_implicit_job_def_for_assets(keys)
        assert implicit is not None, "there are no partitions"
        job = recon_job_from_origin(JobPythonOrigin(implicit.name, repository_origin=location.origin))
        created = instance.create_run_for_job(
            job_def=job.get_definition(),
            run_config=run_config,
            job_code_origin=job.get_python_origin(),
            asset_selection=frozenset(keys),
        )
        instance.add_event_listener(created.run_id, listener)
        result = execute_run(job, created, instance, raise_on_error=False)
    return Ran(created.run_id, result.success)


@contextmanager
def logged_to(path: Path, *, to_stderr: bool = False) -> Iterator[TextIO]:
    """Send what this process and its children print to a file, and yield what they printed to before.

    Where standard output is no file of the system (a test holds it), nothing is sent elsewhere.

    Args:
        path: Of the log; its directory is made.
        to_stderr: Yield what was standard error: standard output is for an answer.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    shown = sys.stderr if to_stderr else sys.stdout
    try:
        numbers = (sys.stdout.fileno(), sys.stderr.fileno())
        number = shown.fileno()
    except (OSError, ValueError, AttributeError):
        yield shown
        return
    sys.stdout.flush()
    sys.stderr.flush()
    kept = [os.dup(each) for each in numbers]
    terminal = os.fdopen(os.dup(number), "w", encoding=shown.encoding, errors="replace", buffering=1)
    with path.open("ab") as log:
        try:
            for each in numbers:
                os.dup2(log.fileno(), each)
            yield terminal
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for each, before in zip(numbers, kept, strict=True):
                os.dup2(before, each)
                os.close(before)
            with suppress(OSError):  # a terminal that was closed takes nothing that is left to be written
                terminal.close()


def log_path(store: Path) -> Path:
    """Return where the log of a run that starts now goes.

    Args:
        store: Directory of the store.
    """
    name = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    return store / ".work" / "logs" / f"{name}-{os.getpid()}.log"
