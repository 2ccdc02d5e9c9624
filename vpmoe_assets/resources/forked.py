"""Has a command forked: `python -I -S forked.py DESCRIPTOR PYTHON -m MODULE [ARGUMENT ...]`.

The socket leads to a process that has imported what the command would (`trainer.job.warm`). What asks there
stays as long as the fork runs, and stands for it: it passes signals on, takes it along when it is killed, and
ends as it ends. Where that process is gone, the command is run as it stands. Only the standard library, a few
milliseconds.
"""

import contextlib
import json
import os
import signal
import socket
import struct
import sys

_PASSED_ON = (signal.SIGINT, signal.SIGTERM, signal.SIGABRT)


def main(descriptor: int, command: list[str]) -> None:
    """Run a command as a fork, or in this process where there is none to be had.

    Args:
        descriptor: Of the socket.
        command: `PYTHON -m MODULE ARGUMENT …`.

    Raises:
        SystemExit: With the fork's exit code.
    """
    # What comes before there is a fork waits until there is.
    signal.pthread_sigmask(signal.SIG_BLOCK, _PASSED_ON)
    with socket.socket(fileno=descriptor) as link:
        fork = _fork(link, command[2:])
        if fork is None:
            link.close()
            signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
            os.execv(command[0], command)
        for number in _PASSED_ON:
            signal.signal(number, lambda number, _: _pass_on(fork, number))
        signal.pthread_sigmask(signal.SIG_UNBLOCK, _PASSED_ON)
        told = link.recv(struct.calcsize("i"), socket.MSG_WAITALL)
    if len(told) < struct.calcsize("i"):
        sys.exit("what watched over the job was killed, and the job with it")
    (code,) = struct.unpack("i", told)
    if code < 0:
        if -code != signal.SIGKILL:
            signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    sys.exit(code)


def _fork(link: socket.socket, arguments: list[str]) -> int | None:
    """Ask for a fork; returns a descriptor of its process, or None where nobody answers."""
    request = {"arguments": arguments, "environment": dict(os.environ), "directory": os.getcwd()}
    try:
        socket.send_fds(link, [b"f"], [0, 1, 2])
        link.sendall(json.dumps(request).encode() + b"\n")
        _, found, _, _ = socket.recv_fds(link, 1, 1)
    except OSError:
        return None
    return found[0] if found else None


def _pass_on(fork: int, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):  # it has ended, and its code is on the way
        signal.pidfd_send_signal(fork, number)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
