"""Python programs as processes of their own, without importing the packages of others anew in each.

A server has imported those, and nothing of this project; a program is a fork of it with its own arguments,
environment, working directory and streams, and finds modules where a new Python with that environment would.
So which modules of this project a program loads, and from where, is as if it had been started by `python`.
What a start itself does is for tests that start one: the kernel shows a fork the environment of the server,
and packages of others have read theirs.

The server is shared by the workers of a run of tests, and ends with the last of them. Those workers are forks
too, of a process that has imported the tests: see `tests/workers.py`.
"""

import atexit
import contextlib
import ctypes
import fcntl
import gc
import hashlib
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
import types
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any, NoReturn

import pytest

OF_OTHERS = (
    # Looks for the docstrings of its classes in every module that there is, so it comes first.
    "wandb.sdk.launch.inputs.internal",
    "torch",
    "torch.distributed.checkpoint",
    "megatron.core",
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "dagster",
    "dagster._cli",
    "dagster._core.storage.sqlite_storage",
    "alembic.command",
    "sqlalchemy",
    "duckdb",
    "numpy",
    "safetensors",
    "psutil",
    "openai_harmony",
    "tiktoken",
    "multiprocessing.spawn",
    "transformers",
    "mergekit.architecture",
    "mergekit.options",
    "mergekit.tokenizer.normalization",
    "mergekit.tokensurgeon",
    "tabulate",  # of Dynamo, where it is loaded, at the end of every process
)
"""What the programs import of others sooner or later. None of these starts a thread, as pyarrow does."""
HUGE = 2 << 20
COLLAPSE = 25
"""Linux's advice to gather small pages in huge ones now."""
SELDOM = (10_000, 10, 10)
"""When the collector looks: often, as is usual, it takes a twentieth of what most tests take."""
ROOT = Path(__file__).resolve().parents[1]
OURS = ("trainer", "vpmoe_assets", "tests")
FORKED = ("trainer", "dagster", "tests.workers")
PYTHON = f"""#!{sys.executable} -IS
import json, os, signal, socket, struct, sys
arguments, environment, executable = sys.argv[1:], dict(os.environ), sys.argv[0]
if arguments[:2] in (["-u", "-c"], ["-m", "tests.workers"]):
    executable = {sys.executable!r}
if arguments[:2] == ["-u", "-c"]:
    arguments, environment["PYTHONUNBUFFERED"] = arguments[1:], "1"
elif arguments[0] == "-P" and arguments[1].endswith("/trainer/surgery/program.py"):
    arguments, environment["PYTHONSAFEPATH"] = ["-m", *arguments[3:]], "1"
elif arguments[:2] not in {[["-m", name] for name in FORKED]} or "RANK" in environment:
    os.execv({sys.executable!r}, [{sys.executable!r}, *arguments])
with socket.socket(socket.AF_UNIX) as server:
    server.connect(sys.argv[0].removesuffix(".python"))
    request = {{"arguments": arguments, "environment": environment, "directory": os.getcwd()}}
    socket.send_fds(server, [b"r"], [0, 1, 2])
    server.sendall(json.dumps({{**request, "executable": executable}}).encode() + b"\\n")
    pid, = struct.unpack("i", server.recv(4))
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: os.kill(pid, number))
    code, = struct.unpack("i", server.recv(4))
if code < 0:
    signal.signal(-code, signal.SIG_DFL)
    os.kill(os.getpid(), -code)
os._exit(code)
"""
"""Stands for `sys.executable` in a program: a trainer, the program that a trainer starts, and Dagster's
command are forks too, and what execnet starts for xdist is, to which it is the usual Python; all else is not.
"""


class Forks:
    """A running server.

    Attributes:
        path: Its socket.
        python: Program that stands for Python's in what it runs.
    """

    def __init__(
        self, path: Path, program: Sequence[str] = (sys.executable, "-P", "-W", "ignore", __file__)
    ) -> None:
        """Start a server, unless it runs.

        Args:
            path: Its socket, below which its other files are named.
            program: Command that serves at a socket, which is its last argument.
        """
        self.path = path
        self.python = path.with_suffix(".python")
        self._program = program
        self._lease = self._connected()

    @classmethod
    def of(cls, run: Path) -> "Forks":
        """Return the server of a run of tests.

        Args:
            run: Directory of its temporary files.
        """
        return cls(_socket_of(run))

    @classmethod
    def light(cls, run: Path) -> "Forks":
        """Return the server of `tests.light`, of the same run."""
        socket = _socket_of(run)
        program = [sys.executable, "-W", "ignore", "-m", "tests.light"]
        return cls(socket.with_name(f"{socket.name}-light"), program)

    @classmethod
    def warm(cls, run: Path) -> "Forks":
        """Return the server of `tests.faults.warm`, for a fault experiment in a directory."""
        program = [sys.executable, "-P", "-W", "ignore", str(ROOT / "tests" / "faults" / "warm.py")]
        return cls(_socket_of(run), program)

    def _connected(self) -> socket.socket:
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            with contextlib.suppress(OSError):
                return self._hold()
            self.python.write_text(PYTHON)
            self.python.chmod(0o700)
            self.path.unlink(missing_ok=True)
            left_out = ("PYTHONPATH", "PYTEST_CURRENT_TEST")
            environment = {name: text for name, text in os.environ.items() if name not in left_out}
            with self.path.with_suffix(".log").open("w") as log:
                server = subprocess.Popen(
                    [*self._program, str(self.path)],
                    cwd=ROOT,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    start_new_session=True,
                )
            while True:
                with contextlib.suppress(OSError):
                    return self._hold()
                assert server.poll() is None, self.path.with_suffix(".log").read_text()
                time.sleep(0.1)

    def _hold(self) -> socket.socket:
        lease = socket.socket(socket.AF_UNIX)
        try:
            lease.connect(str(self.path))
            lease.sendall(b"h")
            if lease.recv(1) != b"h":
                raise ConnectionError("it was about to end")
        except OSError:
            lease.close()
            raise
        return lease

    def run(
        self, arguments: Sequence[str], *, environment: Mapping[str, str], directory: Path
    ) -> subprocess.CompletedProcess[str]:
        """Run `python ARGUMENT …`, which begin with `-c` or `-m`, to its end; outputs are read as text."""
        with tempfile.TemporaryFile("w+") as output, tempfile.TemporaryFile("w+") as errors:
            forked = self.start(
                arguments, environment=environment, directory=directory, output=output, errors=errors
            )
            code = forked.wait()
            output.seek(0)
            errors.seek(0)
            return subprocess.CompletedProcess([*arguments], code, output.read(), errors.read())

    def start(
        self,
        arguments: Sequence[str],
        *,
        environment: Mapping[str, str],
        directory: Path,
        output: IO[str],
        errors: IO[str],
    ) -> "Forked":
        """Start `python ARGUMENT …`, which begin with `-c` or `-m`; it is killed when this process ends."""
        server = socket.socket(socket.AF_UNIX)
        server.connect(str(self.path))
        with Path(os.devnull).open() as nothing:
            socket.send_fds(server, [b"r"], [nothing.fileno(), output.fileno(), errors.fileno()])
        request = {
            "arguments": [*arguments],
            "environment": {**environment},
            "directory": str(directory),
            "executable": str(self.python),
        }
        server.sendall(json.dumps(request).encode() + b"\n")
        (pid,) = struct.unpack("i", server.recv(4))
        return Forked(pid, server)

    @contextlib.contextmanager
    def below(self) -> Iterator[None]:
        """Fork, in this block, what the present process would start: see `PYTHON`."""
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "executable", str(self.python))
            yield

    @property
    def server(self) -> int:
        """Its process."""
        peer = self._lease.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        return int(struct.unpack("3i", peer)[0])

    def close(self) -> None:
        """Need it no longer."""
        self._lease.close()


class Forked:
    """A program that was started.

    Attributes:
        pid: Its process.
    """

    def __init__(self, pid: int, server: socket.socket) -> None:
        self.pid = pid
        self._server = server
        self._code: int | None = None

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        if self._code is None and select.select([self._server], [], [], 0)[0]:
            with self._server:
                (self._code,) = struct.unpack("i", self._server.recv(4))
        return self._code

    def wait(self, seconds: float | None = None) -> int:
        """Return its exit code when it has ended.

        Raises:
            subprocess.TimeoutExpired: It has not, in this time.
        """
        if self._code is None:
            select.select([self._server], [], [], seconds)
        code = self.poll()
        if code is None:
            raise subprocess.TimeoutExpired(str(self.pid), seconds or 0.0)
        return code


def _socket_of(run: Path) -> Path:
    # A socket's path has a hundred characters, and that of a temporary directory may have more.
    name = hashlib.sha256(str(run).encode()).hexdigest()[:16]
    return Path(tempfile.gettempdir(), f"vpmoe-forks-{os.getuid()}-{name}")


def _run_of(tmp_path_factory: pytest.TempPathFactory) -> Path:
    base = tmp_path_factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


@pytest.fixture(scope="session")
def forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server of this run of tests."""
    with contextlib.closing(Forks.of(_run_of(tmp_path_factory))) as server:
        yield server


@pytest.fixture(scope="session")
def light_forks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Forks]:
    """The server of this run of tests whose forks have loaded what the `--help` of a light command does."""
    with contextlib.closing(Forks.light(_run_of(tmp_path_factory))) as server:
        yield server


def wait_for_no_disk() -> None:
    """Let this process and its forks go on before the disk has what they write: no test pulls a plug.

    A test that looks at when something is written finds `os.fsync` called as ever.
    """

    def written(descriptor: int) -> None:
        os.fstat(descriptor)  # which refuses what is no open file, as the system does

    os.fsync = os.fdatasync = written


def read_migrations_once() -> None:
    """Let one reading of Dagster's migrations serve every storage that this process makes, and its forks.

    There are a hundred, of which none is run for a new storage, and reading them takes longer than making it.
    """
    script = importlib.import_module("alembic.script")
    read = script.ScriptDirectory.from_config
    known: dict[str, Any] = {}

    def from_config(config: Any) -> Any:
        place = config.get_main_option("script_location")
        if place not in known:
            known[place] = read(config)
        return known[place]

    script.ScriptDirectory.from_config = from_config
    storage = importlib.import_module("dagster._core.storage.sql")
    from_config(storage.get_alembic_config(storage.__file__)).get_heads()


def _load() -> None:
    """Import what is of others."""
    gc.disable()
    import torch

    # As `trainer.job.startup` does it, which is of this project.
    real, torch.compile = torch.compile, lambda function=None, **_: function or (lambda decorated: decorated)
    for name in OF_OTHERS:
        importlib.import_module(name)
    torch.compile = real
    read_migrations_once()
    gc.freeze()
    ours = [name for name in sys.modules if name.partition(".")[0] in OURS]
    assert not ours, ours
    assert threading.active_count() == 1, threading.enumerate()


def gather_memory() -> None:
    """Keep what this process has in memory in huge pages, where Linux can, so that its forks are cheap.

    To copy, and to drop, the tables of half a gigabyte of small pages takes 32 ms; of huge ones, 12 ms.
    """
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    for line in Path("/proc/self/maps").read_text().splitlines():
        place, mode, _, _, inode, *_ = line.split()
        start, end = (int(number, 16) for number in place.split("-"))
        if mode == "rw-p" and inode == "0":
            for page in range(-(-start // HUGE) * HUGE, end - HUGE + 1, HUGE):
                advise(page, HUGE, COLLAPSE)  # is refused where there is nothing to gather


def serve(path: str) -> None:
    """Fork whatever is asked for until nobody holds a lease.

    Args:
        path: Where to listen.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(path)
    listening.listen(16)
    leases: list[socket.socket] = []
    while True:
        for ready in select.select([listening, *leases], [], [])[0]:
            if ready is not listening:
                ready.close()
                leases.remove(ready)
                continue
            asked, _ = listening.accept()
            kind, descriptors, _, _ = socket.recv_fds(asked, 1, 3)
            if kind == b"h":
                asked.sendall(b"h")
                leases.append(asked)
            elif kind == b"r":
                if os.fork() == 0:
                    for held in (listening, *leases):
                        held.close()
                    _run(asked, descriptors)
                asked.close()
                for descriptor in descriptors:
                    os.close(descriptor)
        if not leases:
            for file in Path(path).parent.glob(f"{Path(path).name}*"):
                file.unlink()
            return


def _run(asked: socket.socket, descriptors: Sequence[int]) -> NoReturn:
    """Run one program in a child and tell whoever asked how it ended."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    with asked.makefile("rb") as lines:
        request = json.loads(lines.readline())
    if (pid := os.fork()) == 0:
        asked.close()
        _become(request, descriptors)
    with contextlib.suppress(OSError):
        asked.sendall(struct.pack("i", pid))
    ended = os.pidfd_open(pid)
    if ended not in select.select([ended, asked], [], [])[0]:  # whoever asked was killed: so is the program
        os.kill(pid, signal.SIGKILL)
    _, status = os.waitpid(pid, 0)
    with contextlib.suppress(OSError):
        asked.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _seekable(descriptor: int) -> bool:
    with contextlib.suppress(OSError):
        os.lseek(descriptor, 0, os.SEEK_CUR)
        return True
    return False


def _become(request: dict, descriptors: Sequence[int]) -> NoReturn:
    """Be the program, to its end."""
    os.setsid()
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        if not _seekable(number):  # the server's own, a file, was
            writes = open(number, "wb", closefd=False)  # noqa: SIM115
            stream = io.TextIOWrapper(writes, getattr(sys, name).encoding, getattr(sys, name).errors)
            setattr(sys, name, stream)
            stream.reconfigure(line_buffering=number == 2 or os.isatty(number))
    if os.environ.get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    gc.set_threshold(*SELDOM)
    gc.enable()
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed()
    flag, program, *rest = request["arguments"]
    assert flag in ("-c", "-m"), flag
    sys.executable = request["executable"]
    if sys.platform == "linux":  # what `ps` shows: all else of the process is the server's
        Path("/proc/self/comm").write_text(program.rpartition(".")[2][:15] if flag == "-m" else "python")
    found = [entry for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    first = [] if os.environ.get("PYTHONSAFEPATH") else ["" if flag == "-c" else os.getcwd()]
    sys.path[:] = [*first, *found, *sys.path]
    importlib.invalidate_caches()
    sys.modules.pop("sitecustomize", None)
    code = 1
    try:
        with contextlib.suppress(ModuleNotFoundError):
            importlib.import_module("sitecustomize")
        sys.argv = [flag, *rest]
        main = sys.modules["__main__"] = types.ModuleType("__main__")
        if flag == "-c":
            exec(compile(program, "<string>", "exec"), main.__dict__)
        else:
            runpy._run_module_as_main(program)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        with contextlib.suppress(BaseException):
            threading._shutdown()
            atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except Exception:  # what Python says of it, it says beside the stream
                code = 120 if stream is not None and not stream.closed else code
        os._exit(code & 0xFF)


if __name__ == "__main__":
    _load()
    wait_for_no_disk()
    if sys.platform == "linux":
        gather_memory()
    serve(sys.argv[1])
