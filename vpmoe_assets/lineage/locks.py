"""Locks between processes: taken with `flock`, so the system releases them when their holder is killed.

A process forked while its parent holds a lock does not hold it, and so does not keep it from anybody when the
parent is gone. Beside each lock a small JSON file says who holds it, for the message to whoever waits. It may
outlive a killed holder; it is read only while the lock is really held.
"""

import contextlib
import errno
import fcntl
import json
import logging
import os
import platform
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path

from trainer.contract.credentials import redact_command
from trainer.contract.files import removed_on_error
from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.errors import BusyError, LocksMissingError

_POLL_S = 0.1
_NO_LOCKS = {errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL}
_log = logging.getLogger(__name__)


@contextlib.contextmanager
def hold(path: Path, what: str, wait_s: float) -> Iterator[None]:
    """Hold the lock file `path`.

    Args:
        path: Of the lock; created, with its directory, and never removed (removing a lock file lets two
            processes hold two files of one name).
        what: Named in messages.
        wait_s: How long to wait for another holder, in seconds; 0 does not wait.

    Raises:
        BusyError: Still held after `wait_s`; the message names the holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    _open.add(descriptor)
    try:
        if not _taken(descriptor, path):
            if wait_s > 0:
                _log.warning("waiting up to %.0f s for %s, held by %s", wait_s, what, holder(path))
            deadline = time.monotonic() + wait_s
            while not _taken(descriptor, path):
                if time.monotonic() >= deadline:
                    raise BusyError(
                        f"{what} is held by {holder(path)}; wait for it, or end that process "
                        f"(waited {wait_s:.0f} s)"
                    )
                time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
        _sign(path)
        yield
    finally:
        if descriptor in _open:  # else this is a forked process, and it was closed there
            with contextlib.suppress(OSError):  # closing it lets go of it, too
                fcntl.flock(descriptor, fcntl.LOCK_UN)
            _open.discard(descriptor)
            os.close(descriptor)


def wait_until_free(path: Path, what: str, wait_s: float) -> None:
    """Wait until nobody holds the lock file `path`; it is not taken, and where there is none not made.

    Args:
        path: Of the lock.
        what: Named in messages.
        wait_s: How long to wait, in seconds; 0 does not wait.

    Raises:
        BusyError: Still held after `wait_s`; the message names the holder.
    """
    deadline = time.monotonic() + wait_s
    while held(path):
        if time.monotonic() >= deadline:
            raise BusyError(
                f"{what} is held by {holder(path)}; wait for it, or end that process (waited {wait_s:.0f} s)"
            )
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))


def held(path: Path) -> bool:
    """Say whether somebody holds the lock file `path` at this moment."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)  # beside others who only ask
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def _taken(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in _NO_LOCKS:
            raise LocksMissingError(
                f"the file system of {path.parent} has no locks ({error.strerror}), and without them two "
                "runs may write the same artifact. Mount NFS as version 4 without nolock, Lustre with flock, "
                "or put VPMOE_ARTIFACTS elsewhere"
            ) from error
        raise
    return True


def _let_go() -> None:
    """Close, in a forked process, what its parent has open: the lock stays the parent's."""
    for descriptor in _open:
        os.close(descriptor)
    _open.clear()


_open: set[int] = set()
"""Descriptors of the locks that this process holds or waits for."""
os.register_at_fork(after_in_child=_let_go)


def holder(path: Path) -> str:
    """Describe the process that holds the lock file `path`, as it signed."""
    try:
        signed = parse_json(_signature(path).read_text())
        return f"pid {signed['pid']} on {signed['host']} since {signed['since']} ({signed['command']})"
    except (OSError, ValueError, KeyError, TypeError):
        return "another process"


def _sign(path: Path) -> None:
    signature = {
        "pid": os.getpid(),
        "host": platform.node(),
        "since": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": " ".join(redact_command(sys.argv))[:200],
    }
    temporary = _signature(path).with_suffix(f".{os.getpid()}")
    with removed_on_error(temporary):
        temporary.write_text(json.dumps(signature))
        temporary.replace(_signature(path))


def _signature(path: Path) -> Path:
    return path.with_suffix(".holder")
