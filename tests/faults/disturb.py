"""What lies between the processes of a fault experiment and the system: see `disturb.c`."""

import errno
import mmap
import shutil
import struct
import subprocess
from pathlib import Path

_HEAD = struct.Struct("qiii236s")


class Disturber:
    """The library that is loaded into every process, and the memory by which it is told what to do.

    Args:
        directory: Where both go.
    """

    def __init__(self, directory: Path) -> None:
        compiler = shutil.which("cc")
        if compiler is None:
            raise FileNotFoundError("no C compiler (`cc`): what makes writes fail cannot be built")
        self.library = directory / "disturb.so"
        source = Path(__file__).with_suffix(".c")
        if not self.library.exists() or self.library.stat().st_mtime < source.stat().st_mtime:
            subprocess.run(
                [compiler, "-O1", "-shared", "-fPIC", "-w", "-o", self.library, source, "-ldl"], check=True
            )
        self.control = directory / "control"
        self.control.write_bytes(b"\0" * _HEAD.size)
        with self.control.open("r+b") as file:
            self._memory = mmap.mmap(file.fileno(), _HEAD.size)

    @property
    def environment(self) -> dict[str, str]:
        """What a process needs to be disturbed."""
        return {"LD_PRELOAD": str(self.library), "VPMOE_FAULTS_CONTROL": str(self.control)}

    def refuse(self, pattern: str, *, spare: int = 0, error: int = errno.ENOSPC) -> None:
        """Let writes to paths that match fail, after some that succeed."""
        # The error last: with it, it begins.
        self._memory[8:] = struct.pack("iii236s", 0, spare, 0, pattern.encode())
        self._memory[8:12] = struct.pack("i", error)

    def set_clock(self, seconds: float) -> None:
        """Add this to everybody's time of day."""
        self._memory[:8] = struct.pack("q", int(seconds * 1e9))

    @property
    def hits(self) -> int:
        """Writes that failed since `refuse`."""
        return int(_HEAD.unpack(self._memory[:])[3])

    def leave(self) -> None:
        """Disturb nothing any more."""
        self._memory[:] = b"\0" * _HEAD.size
