"""A directory as two machines have it that share a file system.

Each machine is a mount of its own (bindfs, in user space), and so has caches of its own, which are as stale
as those of NFS: for a while it knows names that the other has removed, misses names that the other has made,
and has old sizes and times. A file that is removed while it is open gets a hidden name, in its directory, as
NFS's `.nfs…`. Locks are those of the one directory below, or, as with `nolock`, known to one machine alone.
"""

import contextlib
import os
import subprocess
from pathlib import Path

from tests.services.cluster import BOUND, wait_until
from tests.services.debian import program

MOUNTS_ENV = "VPMOE_TEST_MOUNTS"
"""Two mounts of a real network file system, `A:B`, each empty, in the place of those that are made here."""
CACHE_S = 2.0


class SharedDirectory:
    """A directory, mounted twice.

    Args:
        place: An empty directory.
        locks: Whether a machine knows the locks of the other.

    Attributes:
        machines: The directory as each of the machines has it.
    """

    def __init__(self, place: Path, *, locks: bool = True) -> None:
        self.machines = (place / "a", place / "b")
        self._below = place / "below"
        self._locks = locks
        self._servers: list[subprocess.Popen[bytes]] = []

    def mount(self) -> str:
        """Mount it; says why it cannot be, or nothing."""
        found = program("bindfs")
        assert found is not None
        # Contents are as with NFS, which asks again when a file is opened or locked; names and times are not.
        options = ["direct_io", *(f"{name}_timeout={CACHE_S}" for name in ("attr", "entry", "negative"))]
        how = ["-f", "-o", ",".join(options), *(["--enable-lock-forwarding"] if self._locks else [])]
        self._below.mkdir()
        for machine in self.machines:
            machine.mkdir()
            with machine.with_suffix(".out").open("wb") as output:
                server = subprocess.Popen(
                    [*BOUND, found, "--multithreaded", *how, str(self._below), str(machine)],
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                )
            self._servers.append(server)
            wait_until(
                lambda machine=machine, server=server: machine.is_mount() or server.poll() is not None,
                f"the mount {machine}",
                20,
            )
            if server.poll() is not None:
                said = machine.with_suffix(".out").read_text(errors="replace").strip()
                self.unmount()
                return said or f"bindfs ended with {server.returncode}"
        return ""

    def unmount(self) -> None:
        """End both mounts, whoever has files open there."""
        for machine in self.machines:
            if os.path.ismount(machine):
                subprocess.run(["fusermount", "-u", "-z", str(machine)], check=False)
        for server in self._servers:
            with contextlib.suppress(subprocess.TimeoutExpired):
                server.wait(10)
            server.kill()
            server.wait()
