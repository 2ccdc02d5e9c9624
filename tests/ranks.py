"""Runs a function on several gloo ranks, each a process of its own, without importing torch anew in each.

They are forks of a process that was forked when the tests had been imported and none had run: they start in
milliseconds. Only picklable module-level functions run, and find their rank in `RANK`, as under torchrun.
"""

import io
import multiprocessing
import os
import signal
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from contextlib import suppress
from multiprocessing import connection, forkserver, reduction, resource_tracker
from typing import Any

import torch
import torch.distributed as dist

TIMEOUT = 100.0

_context = multiprocessing.get_context("forkserver")


def start_server() -> None:
    """Fork the server of `multiprocessing`, which would import everything anew.

    After a backward pass it would be too late: torch's autograd cannot be forked.
    """
    resource_tracker.ensure_running()
    address = connection.arbitrary_address("AF_UNIX")
    alive, held = os.pipe()
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(address)
        listening.listen()
        if (pid := os.fork()) == 0:
            os.close(held)
            try:
                forkserver.main(listening.detach(), alive, [])
            finally:
                os._exit(0)
    os.close(alive)
    server: Any = forkserver._forkserver  # type: ignore[attr-defined]
    server._forkserver_address, server._forkserver_alive_fd, server._forkserver_pid = address, held, pid


class _Streams:
    """Standard output and error of whoever starts a rank, of which pytest keeps what a test says.

    The server's, which a rank would have else, are those of the run of all tests.
    """

    def __reduce__(self) -> tuple[Callable[..., None], tuple[Any, ...]]:
        return _take, tuple(reduction.DupFd(number) for number in (1, 2))


def _take(*streams: Any) -> None:
    for number, stream in enumerate(streams, 1):
        os.dup2(stream.detach(), number)


def _child(
    _: None, told: Any, variables: dict[str, str], function: Callable[..., Any], arguments: Sequence[Any]
) -> None:
    os.environ.update(variables)
    os.setpgrp()
    try:
        # Not the tensors themselves: those would be shared memory of a process that is about to end.
        result = io.BytesIO()
        torch.save(function(*arguments), result)
        told.send((True, result.getvalue()))
    except BaseException:
        told.send((False, traceback.format_exc()))
        raise


class Ranks:
    """Running ranks; `join` collects what they return."""

    def __init__(self, world: int, function: Callable[..., Any], *arguments: Any) -> None:
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        shared = {
            "WORLD_SIZE": str(world),
            "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            # The ranks are the store's clients all, as under torchrun: a port that rank 0 listens on later
            # may be another's by then.
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": "0",
        }
        self.connections, self.processes = [], []
        for rank in range(world):
            mine, theirs = _context.Pipe()
            variables = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            process = _context.Process(
                target=_child, args=(_Streams(), theirs, variables, function, arguments), daemon=True
            )
            process.start()
            theirs.close()
            self.connections.append(mine)
            self.processes.append(process)

    def signal(self, number: int) -> None:
        """Sends a signal to every rank."""
        for process in self.processes:
            with suppress(ProcessLookupError):
                os.kill(int(process.pid or 0), number)

    def kill(self) -> None:
        """SIGKILL, and waits until they are gone."""
        self.signal(signal.SIGKILL)
        for process in self.processes:
            process.join(TIMEOUT)
            assert process.exitcode == -signal.SIGKILL, (
                f"ended with {process.exitcode} before it could be killed"
            )

    def join(self) -> list[Any]:
        """Results in rank order; fails with the first rank's traceback."""
        results = []
        end = time.monotonic() + TIMEOUT
        try:
            for rank, told in enumerate(self.connections):
                if not told.poll(max(0.0, end - time.monotonic())):
                    raise AssertionError(f"rank {rank} gave no result in {TIMEOUT} s")
                try:
                    passed, value = told.recv()
                except EOFError:
                    raise AssertionError(f"rank {rank} died without a result") from None
                if not passed:
                    raise AssertionError(f"rank {rank} failed:\n{value}")
                results.append(torch.load(io.BytesIO(value), weights_only=False))
        finally:
            for process in self.processes:
                process.join(1.0)
                if process.is_alive():
                    process.kill()
        return results


def run_ranks(world: int, function: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Runs `function(*arguments)` on `world` ranks and returns their results."""
    return Ranks(world, function, *arguments).join()
