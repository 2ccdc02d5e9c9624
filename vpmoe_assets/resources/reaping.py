"""After a crash of an orchestrator: its jobs are ended, its Dagster runs closed, their pool slots freed.

There are two traces. `.process.json` in a work directory names a job's processes, and goes away when they
have gone. The record of a run (`run_record.py`) names its Dagster instance, and goes away when the run is
closed there; until then it stays, whatever happens, because nothing else knows of that run.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from trainer.contract.files import present
from trainer.contract.status import HEARTBEAT_NAME, LOG_NAME
from vpmoe_assets.resources.instances import InstanceUnavailableError, close_run
from vpmoe_assets.resources.process_record import RECORD_NAME, Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import Log, ProcessesRemainError, end_job, members
from vpmoe_assets.resources.run_record import RunRecord, paths

_SKIPPED_DIRECTORIES = frozenset({"checkpoints", ".sources", "output", "run", "wandb", ".scratch", ".staged"})


class HostNotGoneError(ValueError):
    """A host was declared gone that is not, or on which nothing is recorded."""


@dataclass(frozen=True)
class Reaped:
    """What was found and what was done about it: one job, or one run that had none.

    Attributes:
        work_dir: Of the job.
        asset: That the job was making.
        dagster_run_id: Of the job's run, or of the run.
        processes: Processes of the job that were still there.
        needed: Last signal that was needed: "none" where they were exiting by themselves or had gone.
        run_failed: Whether the Dagster run was marked failed by this call.
        note: Why something was left as it is, and what to do about it.
    """

    work_dir: Path | None = None
    asset: str | None = None
    dagster_run_id: str | None = None
    processes: int = 0
    needed: str = "none"
    run_failed: bool = False
    note: str = ""


def reap(store_root: Path, *, grace_s: float = 600.0, log: Log = lambda message: None) -> list[Reaped]:
    """End every job that a killed orchestrator left behind under a store, and close its Dagster runs.

    Args:
        store_root: The store; all work directories under it are looked at.
        grace_s: Time for a checkpoint that is being written, in seconds, for each job.
        log: Told what is done.

    Returns:
        One entry for each work directory with a job in it, also for those that were left alone, and for each
        run of a dead or foreign process that had no job.
    """
    jobs = []
    for work_dir in _work_dirs(store_root):
        log(f"Looking at {work_dir}")
        try:
            done = settle(work_dir, grace_s=grace_s, log=log)
        except ValueError as error:
            done = Reaped(work_dir, note=str(error))
        except ProcessesRemainError as error:
            stuck = ProcessRecord.read(work_dir)
            assert stuck is not None
            done = Reaped(work_dir, stuck.asset, stuck.dagster_run_id, note=str(error))
        if done is not None:
            jobs.append(done)
    with_jobs = {job.dagster_run_id for job in jobs if job.note}
    runs = []
    for path, run in _runs(store_root):
        if isinstance(run, ValueError):
            runs.append(Reaped(dagster_run_id=path.stem, note=str(run)))
        elif run.run_id in with_jobs:
            continue  # a job of it was left as it is, and says why
        elif not run.orchestrator.here:
            runs.append(Reaped(dagster_run_id=run.run_id, note=_elsewhere(run.orchestrator)))
        elif run.orchestrator.dead:
            runs.append(_close(path, run, _death(run)))
    return _joined(jobs, [run for run in runs if run.run_failed or run.note])


def settle(
    work_dir: Path,
    *,
    grace_s: float,
    silence_s: float | None = None,
    log: Log = lambda message: None,
) -> Reaped | None:
    """End the processes that a dead orchestrator left behind in a work directory.

    Args:
        work_dir: The directory.
        grace_s: Time for a checkpoint that is being written, in seconds.
        silence_s: How long the job of another machine is silent until it is taken for dead, in seconds, by
            whoever holds the lock of the directory; None waits for a person to say so.
        log: Told what is done.

    Returns:
        What was done; None where no job had been left. A job on another machine, or one whose orchestrator is
        alive, is left alone and the note says so.

    Raises:
        ValueError: What says so is not a record of a job.
        ProcessesRemainError: Some could not be ended.
    """
    record = ProcessRecord.read(work_dir)
    if record is None:
        return None
    if not record.orchestrator.dead:
        silent = 0.0 if silence_s is None or record.orchestrator.here else _silence(work_dir)
        if silence_s is not None and silent > silence_s:
            log(
                f"{work_dir}: the job of {record.asset} on host {record.orchestrator.host} has been silent "
                f"for {silent:.0f} s, and nobody holds its directory: it is taken for dead."
            )
            ProcessRecord.remove(work_dir, record.marker)
            return Reaped(work_dir, record.asset, record.dagster_run_id)
        note = _elsewhere(record.orchestrator)
        return Reaped(work_dir, record.asset, record.dagster_run_id, note=note)
    left = len(members(record.marker))
    # A job that the kernel told of its orchestrator's death is writing its checkpoint now: no second signal.
    needed = end_job(
        record.marker, command=record.command, grace_s=grace_s, interrupt=not record.death_signal, log=log
    )
    ProcessRecord.remove(work_dir, record.marker)
    return Reaped(work_dir, record.asset, record.dagster_run_id, left, needed)


def end_dead_jobs(store_root: Path, *, grace_s: float = 600.0, log: Log) -> None:
    """End what killed orchestrators of this machine left running, so that a run does not start beside it.

    Args:
        store_root: The store; all work directories under it are looked at.
        grace_s: Time for a checkpoint that is being written, in seconds, for each job.
        log: Told of each job, before it is waited for and when it has ended.
    """
    for work_dir in _work_dirs(store_root):
        try:
            record = ProcessRecord.read(work_dir)
            if record is None or not record.orchestrator.dead:
                continue
            if left := len(members(record.marker)):
                log(
                    f"The process that was making {record.asset} was killed, and {left} of its job are still "
                    f"there; they have {grace_s:g} s to write a checkpoint and exit."
                )
            done = settle(work_dir, grace_s=grace_s, log=log)
        except (ValueError, ProcessesRemainError) as error:
            log(str(error))
            continue
        if left and done is not None:
            log(f"The job of {record.asset} has ended (last signal needed: {done.needed}).")


def close_dead_runs(store_root: Path, log: Log) -> None:
    """Close the runs of killed processes of this machine, so that none of their pool slots is waited for.

    Args:
        store_root: The store whose runs are looked at.
        log: Told of each run that was closed, and of each that could not be.
    """
    for path, run in _runs(store_root):
        if isinstance(run, ValueError):
            log(str(run))
        elif run.orchestrator.dead:
            done = _close(path, run, _death(run))
            if done.run_failed:
                log(f"Run {run.run_id}, whose process was killed, is marked failed.")
            elif done.note:
                log(done.note)


def give_up_host(store_root: Path, host: str) -> list[Reaped]:
    """Take a machine for gone: its jobs count as ended, its runs are closed, its work directories are free.

    Args:
        store_root: The store.
        host: Name of the machine, exactly as it is recorded.

    Raises:
        HostNotGoneError: It is this machine, or no job and no run of it is recorded.
    """
    if host == socket.gethostname():
        raise HostNotGoneError(f"{host} is this machine; `vpmoe reap` alone ends what was left on it")
    hosts, jobs, runs = set(), [], []
    for work_dir in _work_dirs(store_root):
        try:
            job = ProcessRecord.read(work_dir)
        except ValueError:  # nobody's
            continue
        if job is None:
            continue
        hosts.add(job.orchestrator.host)
        if job.orchestrator.host == host:
            ProcessRecord.remove(work_dir, job.marker)
            jobs.append(Reaped(work_dir, job.asset, job.dagster_run_id))
    for path, run in _runs(store_root):
        if isinstance(run, ValueError):
            continue
        hosts.add(run.orchestrator.host)
        if run.orchestrator.host == host:
            runs.append(_close(path, run, f"Host {host}, which executed this run, is gone."))
    if not jobs and not runs:
        others = ", ".join(sorted(hosts - {socket.gethostname()})) or "none"
        raise HostNotGoneError(f"nothing is recorded on host {host!r}; other hosts on record: {others}")
    return _joined(jobs, runs)


def _work_dirs(store_root: Path) -> Iterator[Path]:
    """Work directories with a process record. Checkpoints are not walked: they are many and large."""
    for directory, children, files in os.walk(store_root / ".work"):
        children[:] = sorted(set(children) - _SKIPPED_DIRECTORIES)
        if RECORD_NAME in files:
            yield Path(directory)


def _runs(store_root: Path) -> Iterator[tuple[Path, RunRecord | ValueError]]:
    """Yield the records of runs, or what is wrong with one."""
    for path in paths(store_root):
        try:
            yield path, RunRecord.read(path)
        except FileNotFoundError:  # its process ended just now
            continue
        except (ValueError, OSError) as error:
            yield path, ValueError(str(error))


def _silence(work_dir: Path) -> float:
    """Return how long ago a job last wrote, in seconds, by the clock of the file system."""
    written = [work_dir / name for name in (RECORD_NAME, HEARTBEAT_NAME, LOG_NAME)]
    return present(work_dir) - max(path.stat().st_mtime for path in written if path.exists())


def _elsewhere(orchestrator: Orchestrator) -> str:
    if orchestrator.here:
        return f"is being run by process {orchestrator.pid}"
    host = orchestrator.host
    return (
        f"runs or ran on host {host}: reap it there, or, if that machine is gone for good, with "
        f"`vpmoe reap --host-gone {host}`"
    )


def _death(run: RunRecord) -> str:
    process = run.orchestrator
    return f"Process {process.pid} on {process.host}, which executed this run, died; reaped."


def _close(path: Path, run: RunRecord, why: str) -> Reaped:
    try:
        with run.instance.open() as instance:
            failed = close_run(instance, run.run_id, why)
        path.unlink(missing_ok=True)
    except (InstanceUnavailableError, OSError) as error:
        note = (
            f"run {run.run_id} could not be closed: {error}. Bring it back and run `vpmoe reap` again; "
            f"if it was removed on purpose, remove {path}"
        )
        return Reaped(dagster_run_id=run.run_id, note=note)
    return Reaped(dagster_run_id=run.run_id, run_failed=failed)


def _joined(jobs: list[Reaped], runs: list[Reaped]) -> list[Reaped]:
    """Say of each job what became of its run, and list the runs without a job after them."""
    closed = {run.dagster_run_id: run for run in runs}
    told = [
        replace(job, run_failed=run.run_failed, note=job.note or run.note)
        if (run := closed.get(job.dagster_run_id))
        else job
        for job in jobs
    ]
    of_jobs = {job.dagster_run_id for job in jobs}
    return told + [run for run in runs if run.dagster_run_id not in of_jobs]
