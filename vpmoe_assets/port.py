"""`python -m vpmoe_assets.port [PORT | pages]`: print a port that the UI can have, or the pages beside it."""

import errno
import os
import socket
import sys
from collections.abc import Sequence

HOST = "127.0.0.1"
USUAL = range(3000, 3100)
PAGES = range(3100, 3200)
"""Of `vpmoe browse`, beside the UI."""


def port_for(wanted: str) -> int:
    """Return the port that was asked for, or the first that is free of the usual ones.

    Args:
        wanted: A port's number, or nothing.

    Raises:
        ValueError: It is no port, or nobody can listen there; says what to do.
    """
    if not wanted:
        for port in USUAL:
            if _refusal(port) is None:
                return port
        raise ValueError(f"ports {USUAL[0]} to {USUAL[-1]} are all taken: choose another, make ui PORT=8080")
    if not (wanted.isascii() and wanted.isdecimal() and 0 < int(wanted[:6]) < 65536 and len(wanted) < 6):
        raise ValueError(f"PORT={wanted!r} is no port: give a number from 1 to 65535")
    refusal = _refusal(int(wanted))
    if refusal is None:
        return int(wanted)
    what = "is taken" if refusal.errno == errno.EADDRINUSE else f"cannot be had ({refusal.strerror})"
    raise ValueError(f"port {wanted} {what}: choose another, or leave PORT out for the first that is free")


def main(arguments: Sequence[str]) -> int:
    """Print the port, and on standard error what a person is to know of it."""
    if list(arguments) == ["pages"]:
        print(os.environ.get("VPMOE_BROWSE_PORT") or _free(PAGES))
        return 0
    try:
        port = port_for(" ".join(arguments).strip())
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    if not any(arguments) and port != USUAL[0]:
        print(f"port {USUAL[0]} is taken; the UI will be on http://{HOST}:{port}", file=sys.stderr)
    print(port)
    return 0


def _free(ports: Sequence[int]) -> int:
    """Return the first port that is free, or the first: whoever wants it says that it is taken."""
    return next((port for port in ports if _refusal(port) is None), ports[0])


def _refusal(port: int) -> OSError | None:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the server does
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return error
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
