"""Checkpoints that are measured beside each other, by processes that share the threads of a CPU.

Measuring is many small operations: a second thread of torch makes one checkpoint a quarter faster, a second
process measures another one meanwhile. The processes are forks of the job's, so nothing is imported again;
they are told names one at a time, and the job's own process alone writes what tells of the whole job.
"""

import multiprocessing
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import psutil
import torch
from megatron.core import parallel_state

from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.job import Job
from trainer.job.lifecycle import Interrupted, JobError
from trainer.job.signals import StopRequest
from trainer.job.workdir import LOGGER

Tell = Callable[[str, Any], None]
"""`(kind, value)`: what a measuring process says of itself, see `Run`."""
Work = Callable[[Iterator[str], Tell], None]
"""Measures the names that it is given, and tells."""

_LOOK_S = 0.5
"""Time between two looks at whether a stop was asked for."""
_OWN_BYTES = 1 << 30
"""What a process needs beside weights, about."""
_kept: list[Any] = []


def processes(job: Job, names: Sequence[str], given: int | None) -> int:
    """Return how many processes measure beside each other.

    One where a GPU computes. On a CPU one for each of its threads, if there are so many checkpoints, and
    memory for the largest of them in each process.

    Args:
        job: The job.
        names: Its checkpoints.
        given: As many are asked for; fewer only where there are fewer checkpoints.

    Raises:
        ConfigError: Several are asked for where one process has the device.
    """
    alone = job.execution.device != "cpu"
    if given is not None:
        if alone and given > 1:
            raise ConfigError(
                f"--processes {given}: with execution.device = {job.execution.device!r} one process "
                "measures; leave --processes out"
            )
        return min(given, len(names))
    if alone or len(names) < 2:
        return 1
    # Read in float32, whatever they are stored in.
    largest = max(2 * _bytes(Path(job.inputs[name].path)) for name in names if name in job.inputs)
    room = psutil.virtual_memory().available // (largest + _OWN_BYTES)
    return max(1, min(torch.get_num_threads(), len(names), room))


def _bytes(path: Path) -> int:
    return sum(file.stat().st_size for file in path.glob("*.safetensors"))


def share_threads(among: int) -> None:
    """Give this process its share of the threads; a fork must not use those of the process it came from."""
    torch.set_num_threads(max(1, torch.get_num_threads() // among))


def measure_beside(names: Sequence[str], count: int, work: Work, hear: Tell, stop: StopRequest) -> None:
    """Have names worked on by several forks of this process, each asked for the next when it is free.

    Args:
        names: In the order in which they are begun.
        count: Processes.
        work: What each of them does.
        hear: Is told, in this process, what they tell.
        stop: Passed on to them.

    Raises:
        Interrupted: They stopped as asked.
        ConfigError: One found the job wrong; the others were stopped.
        JobError: One ended otherwise; the others were stopped.
    """
    waiting = list(reversed(names))
    forks: dict[Connection, BaseProcess] = {}
    ends: list[Exception] = []
    told_to_stop = False
    context = multiprocessing.get_context("fork")
    try:
        for number in range(count):
            ours, theirs = context.Pipe()
            fork: BaseProcess = context.Process(
                target=_fork, args=(theirs, [*forks, ours], work), name=f"measure_{number}", daemon=True
            )
            with warnings.catch_warnings():  # the other thread here writes heartbeats, and holds nothing
                warnings.simplefilter("ignore", DeprecationWarning)
                fork.start()
            theirs.close()
            forks[ours] = fork
        while forks:
            if (stop or ends) and not told_to_stop:
                told_to_stop = True
                for fork in forks.values():
                    fork.terminate()
            for ready in wait(list(forks), timeout=_LOOK_S):
                assert isinstance(ready, Connection)
                try:
                    kind, value = ready.recv()
                except EOFError:
                    fork = forks.pop(ready)
                    fork.join()
                    if fork.exitcode:
                        ends.append(JobError(f"{fork.name}, a process of this job, {_ended(fork.exitcode)}"))
                    continue
                if kind == "free":
                    with suppress(BrokenPipeError):  # it has ended meanwhile, and says so
                        ready.send(waiting.pop() if waiting and not ends else None)
                elif kind == "ended":
                    ends.append(value)
                else:
                    hear(kind, value)
    finally:
        for fork in forks.values():
            fork.kill()
        for fork in forks.values():
            fork.join()
    # What was wrong, before the stop of the others that it led to.
    for end in sorted(ends, key=lambda each: isinstance(each, Interrupted)):
        raise end


def _fork(theirs: Connection, others: Sequence[Connection], work: Work) -> None:
    """Work until there is nothing left; whatever ends it is told."""
    for other in others:
        other.close()
    # A process group of an earlier session waits, as it goes, for threads that a fork has not: it stays.
    _kept.extend(vars(parallel_state).values())

    def tell(kind: str, value: Any) -> None:
        theirs.send((kind, value))

    def names() -> Iterator[str]:
        while True:
            tell("free", None)
            name = theirs.recv()
            if name is None:
                return
            yield name

    try:
        work(names(), tell)
    except (BrokenPipeError, EOFError):
        os._exit(1)  # nobody is there to be told anything
    except Interrupted as pause:
        tell("ended", Interrupted(str(pause)))
    except ConfigError as error:
        tell("ended", ConfigError(str(error)))
    except BaseException as error:  # whatever it is, the job must not wait for ever
        LOGGER.debug("%s", traceback.format_exc())
        tell("ended", JobError(f"{type(error).__name__}: {error}"))


def _ended(code: int) -> str:
    return f"was ended by signal {-code}" if code < 0 else f"ended with exit code {code}"
