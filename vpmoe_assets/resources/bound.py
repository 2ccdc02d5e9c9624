"""Runs a command bound to the life of its parent: `python -I -S bound.py SIGNAL COMMAND [ARGUMENT ...]`.

When the parent dies, however it dies, the kernel sends SIGNAL to the command. The binding is made in the
child, by a program of its own, because `preexec_fn` is not safe in a parent with threads; it survives the
`exec`, and the process id stays the same. Only the standard library, a few milliseconds.

`VPMOE_PARENT_PID` names the parent that is expected, so that a parent that died before the binding is
noticed.
"""

import ctypes
import os
import resource
import signal
import sys

PARENT_ENV = "VPMOE_PARENT_PID"
PR_SET_PDEATHSIG = 1


def main(arguments: list[str]) -> None:
    """Bind this process to its parent and become the command.

    Args:
        arguments: The signal's name, then the command with its arguments.

    Raises:
        SystemExit: The arguments are incomplete, or the parent is gone already.
        OSError: The kernel refused the binding, or the command cannot be run.
    """
    if len(arguments) < 2:
        sys.exit("usage: bound.py SIGNAL COMMAND [ARGUMENT ...]")
    number = signal.Signals[arguments[0]]
    # A shell starts background jobs with SIGINT ignored, and what is ignored stays ignored over exec.
    for name in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(name, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    # A trainer that hangs is ended with SIGABRT to print its stack; its core would be as large as the model.
    resource.setrlimit(resource.RLIMIT_CORE, (0, resource.getrlimit(resource.RLIMIT_CORE)[1]))
    if sys.platform == "linux":
        libc = ctypes.CDLL(None, use_errno=True)
        if libc.prctl(PR_SET_PDEATHSIG, int(number), 0, 0, 0) != 0:
            code = ctypes.get_errno()
            raise OSError(code, f"prctl(PR_SET_PDEATHSIG, {number.name}): {os.strerror(code)}")
        expected = os.environ.get(PARENT_ENV)
        if expected and os.getppid() != int(expected):
            sys.exit(
                f"process {expected}, which started this one, ended at once: not starting {arguments[1]}"
            )
    os.execvp(arguments[1], arguments[1:])


if __name__ == "__main__":
    main(sys.argv[1:])
