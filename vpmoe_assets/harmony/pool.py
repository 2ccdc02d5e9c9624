"""A pool of worker processes, one shard at a time each, that never outlives the process that started it.

Workers are plain subprocesses rather than `multiprocessing` children: those run the caller's main module
again (for Dagster: seconds). A worker whose parent is gone sees the end of its standard input and exits, also
when the parent was killed with SIGKILL. (A parent-death signal would go off as soon as the parent's thread
ends, and Dagster runs assets in threads.)
"""

import logging
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.connection import Connection, Pipe, wait
from types import TracebackType
from typing import Any, Protocol, Self

from vpmoe_assets.errors import WorkerError

Report = Callable[[int], None]

logger = logging.getLogger(__name__)


class Worker(Protocol):
    """Builds one shard. Must be picklable by reference and idempotent."""

    def __call__(self, shard: int, report: Report) -> Any:
        """Build shard `shard`, calling `report(rows)` now and then; the result must be picklable."""


class Engine(Protocol):
    """Runs shards somewhere else than in processes of this machine; it decides no byte."""

    def __call__(self, worker: Worker, n: int, progress: "Progress | None" = None) -> list[Any]:
        """Run `worker` for shards 0 to n-1 and return their results in that order; see `run_shards`."""


class Progress:
    """Rows done: a bar on a terminal, a plain line every `interval_s` elsewhere.

    Args:
        label: What is being built.
        total: Rows in all.
        write: Takes the plain lines; standard error by default.
        interval_s: Seconds between plain lines.
    """

    def __init__(
        self, label: str, total: int, write: Callable[[str], None] | None = None, interval_s: float = 10.0
    ) -> None:
        self._label, self._total, self._interval_s = label, total, interval_s
        self._write = write or (lambda line: print(line, file=sys.stderr, flush=True))
        self._bar: Any = None
        if write is None and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=label, unit="row", unit_scale=True, dynamic_ncols=True)
        self._rows = 0
        self._started = self._last = time.monotonic()

    def advance(self, rows: int) -> None:
        """Count `rows` more."""
        self._rows += rows
        if self._bar is not None:
            self._bar.update(rows)
        elif time.monotonic() - self._last >= self._interval_s:
            self._last = time.monotonic()
            self._write(self._line())

    def close(self) -> None:
        """End the bar, or write the last line."""
        if self._bar is not None:
            self._bar.close()
        else:
            self._write(self._line())

    def _line(self) -> str:
        seconds = max(time.monotonic() - self._started, 1e-9)
        return f"{self._label}: {self._rows:,} of {self._total:,} rows, {self._rows / seconds:,.0f} rows/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_shards(
    worker: Worker, n: int, processes: int, progress: Progress | None = None, engine: Engine | None = None
) -> list[Any]:
    """Run `worker` for shards 0 to n-1 and return their results in that order.

    An engine runs them all; without one, processes of this machine do. With one process everything runs in
    the calling process. Otherwise the first failure ends the other workers: what they had not finished is
    redone by the next run, what they had finished is kept.

    Raises:
        Exception: What the worker raised, as it raised it.
        WorkerError: A worker was killed or ended by itself.
    """
    if engine is not None:
        return engine(worker, n, progress)
    report = progress.advance if progress is not None else lambda rows: None
    if processes < 1:
        raise ValueError(f"processes must be at least 1, got {processes}")
    if processes == 1 or n <= 1:
        return [worker(shard, report) for shard in range(n)]
    results: dict[int, Any] = {}
    waiting = deque(range(n))
    children: dict[Connection, _Child] = {}
    try:
        for _ in range(min(processes, n)):
            child = _Child(worker)
            children[child.connection] = child
            child.give(waiting.popleft())
        while len(results) < n:
            for connection in wait(list(children)):
                child = children[connection]  # type: ignore[index]
                kind, value = child.receive()
                if kind == "rows":
                    report(value)
                elif kind == "failed":
                    raise value
                else:
                    results[child.shard] = value
                    if waiting:
                        child.give(waiting.popleft())
                    else:
                        child.end()
                        del children[connection]  # type: ignore[arg-type]
    finally:
        for child in children.values():
            child.kill()
    return [results[shard] for shard in range(n)]


class _Child:
    def __init__(self, worker: Worker) -> None:
        self.shard = -1
        self.connection, theirs = Pipe()
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path)}
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "vpmoe_assets.harmony.pool", str(theirs.fileno())],
            stdin=subprocess.PIPE,  # never written to: its end tells the child that this process is gone
            pass_fds=[theirs.fileno()],
            env=environment,
        )
        theirs.close()
        with suppress(OSError):  # a child that is already dead is reported by receive()
            self.connection.send_bytes(pickle.dumps(worker))

    def give(self, shard: int) -> None:
        self.shard = shard
        with suppress(OSError):
            self.connection.send(shard)

    def receive(self) -> tuple[str, Any]:
        try:
            message: tuple[str, Any] = self.connection.recv()
        except (EOFError, ConnectionError):
            code = self._process.wait()
            how = (
                f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
            )
            raise WorkerError(
                f"the worker of shard {self.shard:02d} {how}. Finished shards are kept: "
                "run the same command again and it goes on from there"
            ) from None
        return message

    def end(self) -> None:
        self.connection.close()
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()

    def kill(self) -> None:
        self._process.kill()
        self.end()


def _serve(connection: Connection) -> None:
    worker: Worker = pickle.loads(connection.recv_bytes())
    while True:
        try:
            shard = connection.recv()
        except EOFError:
            return
        try:
            result = worker(shard, lambda rows: connection.send(("rows", rows)))
        except BaseException as error:
            logger.debug("shard %d failed", shard, exc_info=True)
            connection.send(("failed", portable(error)))
        else:
            connection.send(("done", result))


def portable(error: BaseException) -> BaseException:
    """Return an error that another process can be told of: itself, or its message where it cannot travel."""
    try:
        if isinstance(error, Exception) and str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:
        logger.debug("cannot pickle %r", error)
    return WorkerError(f"{type(error).__name__}: {error}")


def _exit_with_parent() -> None:
    while os.read(0, 4096):
        pass
    os._exit(1)


def _main() -> None:
    # Results travel on a pipe of their own; a stray print must reach neither it nor the caller's output.
    os.dup2(2, 1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends its workers
    threading.Thread(target=_exit_with_parent, daemon=True).start()
    with suppress(BrokenPipeError):
        _serve(Connection(int(sys.argv[1])))


if __name__ == "__main__":
    # By its name: classes pickled here must not be those of a module called __main__.
    from vpmoe_assets.harmony import pool

    pool._main()
