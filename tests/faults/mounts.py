"""A store's directory as a disk of its own: a small one, or one that is read-only. Mounting is for root."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path


def why_not() -> str | None:
    """Return why nothing can be mounted here; None where it can."""
    with tempfile.TemporaryDirectory() as directory:
        tried = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", directory], capture_output=True, text=True
        )
        if tried.returncode == 0:
            subprocess.run(["umount", directory], check=True)
            return None
    return tried.stderr.strip() or "`mount` failed"


def move_to_disk(directory: Path) -> None:
    """Put what is in a directory on a disk in memory that is mounted there."""
    before = directory.with_name(f"{directory.name}-before")
    directory.rename(before)
    directory.mkdir()
    _run("mount", "-t", "tmpfs", "-o", "size=4g", "tmpfs", str(directory))
    _run("cp", "-a", f"{before}/.", str(directory))
    shutil.rmtree(before)


def leave_room(directory: Path, size: int | None) -> None:
    """Let that disk have this many bytes free; as many as it was made with, for None."""
    found = os.statvfs(directory)
    used = (found.f_blocks - found.f_bfree) * found.f_frsize
    _run("mount", "-o", f"remount,size={4 << 30 if size is None else used + size}", str(directory))


def lock_up(directory: Path) -> None:
    """Let nothing be written below a directory, to whatever is not open yet."""
    _run("mount", "--bind", str(directory), str(directory))
    _run("mount", "-o", "remount,bind,ro", str(directory))


def let_go(site: Path) -> None:
    """Unmount what is mounted in a site."""
    store = str((site / "artifacts").resolve())
    # A directory that is mounted on itself is no mount point to `os.path.ismount`.
    for line in Path("/proc/self/mounts").read_text().splitlines():
        if line.split(" ")[1] == store:
            _run("umount", store)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(command)}: {done.stderr}"
