"""Another program as part of a job: its output goes to a log, its progress shows, it never outlives the job.

`run_program` runs this file as the child: it asks the kernel to be killed when the job dies, however it
dies, and then becomes the module that was asked for. `preexec_fn` would be shorter and is not safe beside
threads.
"""

import ctypes
import os
import runpy
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

POLL_SECONDS = 0.2
GRACE_SECONDS = 10.0
_PR_SET_PDEATHSIG = 1
_TAIL_BYTES = 4096


class ProgramError(ValueError):
    """The program failed; the message has the end of its output."""


def run_program(
    module: str,
    arguments: Sequence[str],
    *,
    log: Path,
    environment: Mapping[str, str],
    beat: Callable[[], None],
) -> None:
    """Run `python -m module` to its end.

    Args:
        module: What to run.
        arguments: Its command line.
        log: File for standard output and error.
        environment: Variables to add to this process's.
        beat: Called several times a second; may raise to stop, which ends the program.

    Raises:
        ProgramError: The exit code is not 0.
    """
    command = [sys.executable, "-P", __file__, str(os.getpid()), module, *arguments]
    with log.open("wb") as output:
        child = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **environment},
        )
        try:
            while child.poll() is None:
                time.sleep(POLL_SECONDS)
                beat()
        finally:
            _end(child)
    if child.returncode != 0:
        ended = f"signal {-child.returncode}" if child.returncode < 0 else f"exit code {child.returncode}"
        raise ProgramError(f"{module} ended with {ended}. The end of its output ({log}):\n{_tail(log)}")


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(GRACE_SECONDS)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _tail(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - _TAIL_BYTES))
        text = file.read().decode(errors="replace")
    lines = [line.rpartition("\r")[2] for line in text.rstrip().split("\n")]  # a bar's last state
    return "\n".join(lines[-20:])


def _become(parent: int, module: str, arguments: Sequence[str]) -> None:
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(_PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0) != 0:
            raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG)")
        if os.getppid() != parent:
            sys.exit(f"the job {parent}, which started this program, is gone")
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2], sys.argv[3:])
