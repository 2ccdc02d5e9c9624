"""`python -m trainer.job.warm DESCRIPTOR`: has imported what every job imports, and forks jobs.

A job's start is three seconds of one core, which go into imports of others' packages; a fork has them. Of
this project nothing is imported here but what loads Megatron, so a job finds its own modules as a new process
would, and what it witnesses of them is the same. There is no other thread yet, and no process group of
torch's, so a fork lacks none.

The descriptor is a socket to whoever starts jobs. One byte on it says that forks can be had; then each
message brings a socket on which a program asks for one (`vpmoe_assets.resources.forked`): its streams, then a
line of JSON with arguments (the module first), environment and directory. It is sent a descriptor of the
fork's process, by which it passes signals on, and in the end the exit code. Between the two stands a
guardian, the fork's parent: when the program that asked is killed, so is the fork.
"""

import atexit
import ctypes
import gc
import importlib
import json
import os
import runpy
import select
import signal
import socket
import struct
import sys
import threading
import traceback
import types
from collections.abc import Sequence
from typing import Any, NoReturn

from trainer.job.startup import load_megatron, wait_passively

READY = b"r"
_OF_OTHERS = (
    "megatron.core.dist_checkpointing",
    "megatron.core.models.gpt",
    "numpy",
    "safetensors.torch",
    "torch.distributed.checkpoint",
    "tqdm",
)
_PR_SET_PDEATHSIG = 1
_STREAMS = 3


def main(descriptor: int) -> None:
    """Load, and fork whatever is asked for until whoever starts jobs is gone.

    Args:
        descriptor: Of the socket to it.

    Raises:
        RuntimeError: An import has started threads, which a fork would lack.
    """
    wait_passively()
    load_megatron()
    for name in _OF_OTHERS:
        importlib.import_module(name)
    gc.freeze()
    if (pid := os.fork()) == 0:  # OpenBLAS ends its threads before a fork, and begins them when it needs them
        os._exit(0)
    os.waitpid(pid, 0)
    if len(os.listdir("/proc/self/task")) > 1:
        raise RuntimeError("what was imported has started threads: no job can be forked from here")
    with socket.socket(fileno=descriptor) as control:
        control.sendall(READY)
        while True:
            message, links, _, _ = socket.recv_fds(control, 1, 1)
            if not message:
                return
            if os.fork() == 0:
                control.close()
                _guard(links[0])
            os.close(links[0])
            _bury()


def _bury() -> None:
    """Let guardians go that have ended; their time is counted as this process's children's."""
    while True:
        try:
            if os.waitpid(-1, os.WNOHANG)[0] == 0:
                return
        except ChildProcessError:
            return


def _guard(descriptor: int) -> NoReturn:
    """Fork one job, and stay with it to its end."""
    with socket.socket(fileno=descriptor) as link:
        _, streams, _, _ = socket.recv_fds(link, 1, _STREAMS)
        with link.makefile("rb") as lines:
            request = json.loads(lines.readline() or "null")
        if request is None or len(streams) < _STREAMS:  # it ended before it had asked
            os._exit(1)
        if (pid := os.fork()) == 0:
            link.close()
            _become(request, streams)
        ended = os.pidfd_open(pid)
        socket.send_fds(link, [b"p"], [ended])
        if ended not in select.select([ended, link.fileno()], [], [])[0]:
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        link.sendall(struct.pack("i", os.waitstatus_to_exitcode(status)))
    os._exit(0)


def _become(request: dict[str, Any], streams: Sequence[int]) -> NoReturn:
    """Be `python -m MODULE …`, as if it had been started, to its end."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
        os._exit(1)
    os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.modules["numpy"].random.seed()
    sys.argv = [*request["arguments"]]
    sys.modules["__main__"] = types.ModuleType("__main__")
    code = 1
    try:
        runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(code & 0xFF)


if __name__ == "__main__":
    main(int(sys.argv[1]))
