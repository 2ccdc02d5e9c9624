"""GPUs for one job: a file lock per device, held as long as any process of the job lives.

Dagster's pools count steps; they know neither how many GPUs a step wants nor which. The lock files lie where
every checkout and every user of this machine finds them, one for each GPU by its UUID, and the locked
descriptors are passed on to the job: when the orchestrator is killed, a GPU stays leased until its trainer
has gone.
"""

import contextlib
import fcntl
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from trainer.contract.json_text import parse_json
from vpmoe_assets.resources.launcher import LaunchError
from vpmoe_assets.resources.processes import Log, members

LEASE_DIR_ENV = "VPMOE_LEASE_DIR"
_POLL_S = 2.0
_REMIND_S = 60.0


class NoGpuError(LaunchError):
    """A GPU was asked for and this machine has none, or not enough."""


class GpusBusyError(LaunchError):
    """The GPUs are leased to other jobs, and the time to wait for them is over."""


class LeasesUnusableError(LaunchError):
    """The lock files of this machine's GPUs cannot be opened by this user."""


@dataclass(frozen=True)
class Gpu:
    """One device: its UUID, which `CUDA_VISIBLE_DEVICES` takes, and its product name."""

    uuid: str
    name: str


@dataclass(frozen=True)
class Lease:
    """Devices that belong to one job.

    Attributes:
        gpus: The devices.
        descriptors: Locked file descriptors, to be passed on to the job's first process.
    """

    gpus: tuple[Gpu, ...] = ()
    descriptors: tuple[int, ...] = ()

    @property
    def environment(self) -> dict[str, str]:
        """`CUDA_VISIBLE_DEVICES` of the job: its devices by UUID, or nothing at all for a job on the CPU."""
        return {"CUDA_VISIBLE_DEVICES": ",".join(gpu.uuid for gpu in self.gpus)}


def lease_dir() -> Path:
    """Where this machine's lock files lie: `$VPMOE_LEASE_DIR`, or a folder beside other temporary files."""
    return Path(os.environ.get(LEASE_DIR_ENV) or Path(tempfile.gettempdir()) / "vpmoe-leases")


def list_gpus() -> list[Gpu]:
    """Return the GPUs that `CUDA_VISIBLE_DEVICES` leaves visible, in the driver's (PCI) order.

    Empty where there is no NVIDIA driver.

    Raises:
        NoGpuError: `CUDA_VISIBLE_DEVICES` names a device that does not exist.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
    except pynvml.NVMLError:
        return []
    try:
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        gpus = [Gpu(_text(pynvml.nvmlDeviceGetUUID(h)), _text(pynvml.nvmlDeviceGetName(h))) for h in handles]
    finally:
        pynvml.nvmlShutdown()
    return visible(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))


def _text(value: str | bytes) -> str:
    return value.decode() if isinstance(value, bytes) else value


def visible(gpus: Sequence[Gpu], setting: str | None) -> list[Gpu]:
    """Those of `gpus` that a value of `CUDA_VISIBLE_DEVICES` selects, in its order; all of them for None.

    A MIG slice is named by its own UUID and is taken as given.

    Raises:
        NoGpuError: An entry is no index and no (beginning of a) UUID of a device.
    """
    if setting is None:
        return list(gpus)
    chosen = []
    for entry in filter(None, (part.strip() for part in setting.split(","))):
        if entry.startswith("MIG-"):
            chosen.append(Gpu(entry, "MIG device"))
            continue
        if entry.isdigit():
            found = list(gpus[int(entry) : int(entry) + 1])
        else:
            found = [gpu for gpu in gpus if gpu.uuid.startswith(entry)]
        if len(found) != 1:
            have = ", ".join(f"{i}: {gpu.uuid}" for i, gpu in enumerate(gpus)) or "none"
            raise NoGpuError(f"CUDA_VISIBLE_DEVICES={setting}: {entry!r} is not one device. Devices: {have}.")
        chosen += found
    return chosen


@contextlib.contextmanager
def lease(
    count: int,
    *,
    holder: dict[str, object],
    wait_s: float,
    directory: Path | None = None,
    gpus: Callable[[], Sequence[Gpu]] = list_gpus,
    log: Log = lambda message: None,
) -> Iterator[Lease]:
    """Lease `count` GPUs, all or none, waiting for others to finish.

    Args:
        count: Number of devices; 0 leases nothing and hides every GPU from the job.
        holder: Shown to those who wait: at least `marker` (of the job's processes), `asset` and `pid`.
        wait_s: How long to wait, in seconds.
        directory: Where the lock files are; `lease_dir()` by default.
        gpus: Lists the devices.
        log: Told once a minute who holds what is waited for.

    Yields:
        The lease. It ends with the block, or, if this process dies, with the last process of the job.

    Raises:
        NoGpuError: The machine has fewer devices than asked for.
        GpusBusyError: Not enough became free in time; the message names the holders.
        LeasesUnusableError: The lock files cannot be opened.
    """
    if count == 0:
        yield Lease()
        return
    devices = list(gpus())
    if len(devices) < count:
        raise NoGpuError(
            f'device = "cuda" with nproc = {count} asks for {count} GPU(s), one each; found {len(devices)} '
            f"(CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', 'not set')}). "
            'Lower nproc, make more devices visible, or set device = "cpu"; '
            "`nvidia-smi -L` lists what the driver sees."
        )
    where = _for_everybody(directory or lease_dir())
    deadline, remind = time.monotonic() + wait_s, 0.0
    while True:
        held = _acquire(devices, count, where, holder)
        if held is not None:
            break
        holders = "; ".join(f"{gpu.uuid}: {_holder(where / _file_name(gpu))}" for gpu in devices)
        if time.monotonic() >= deadline:
            raise GpusBusyError(
                f"{count} GPU(s) asked for, {len(devices)} visible, and not enough became free within "
                f"{wait_s:g} s. Held by: {holders}. Wait for these jobs, cancel them, or run `vpmoe reap` if "
                "their run is dead."
            )
        if time.monotonic() >= remind:
            log(f"Waiting for {count} GPU(s). Held by: {holders}")
            remind = time.monotonic() + _REMIND_S
        time.sleep(min(_POLL_S, max(0.0, deadline - time.monotonic())))
    try:
        yield Lease(tuple(gpu for gpu, _ in held), tuple(fd for _, fd in held))
    finally:
        for _, descriptor in held:
            os.ftruncate(descriptor, 0)
            os.close(descriptor)  # without LOCK_UN: a process of the job that still lives keeps the lock


def _for_everybody(directory: Path) -> Path:
    """Return the directory of the lock files, made for all users of this machine where it is missing."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(directory, error) from error
    with contextlib.suppress(PermissionError):  # made by another user, who did this already
        directory.chmod(0o1777)
    return directory


def _unusable(path: Path, error: OSError) -> LeasesUnusableError:
    return LeasesUnusableError(
        f"{path}, by which GPUs are leased, cannot be used ({error.strerror}). All users who share this "
        "machine's GPUs have to read and write the files there; remove it if it is a leftover, or set "
        f"{LEASE_DIR_ENV} to a directory that all of them can write to, the same for all."
    )


def _file_name(gpu: Gpu) -> str:
    return f"{gpu.uuid}.lock"


def _acquire(
    devices: Sequence[Gpu], count: int, where: Path, holder: dict[str, object]
) -> list[tuple[Gpu, int]] | None:
    """Lock the first `count` free devices; None, with nothing locked, where there are fewer."""
    held: list[tuple[Gpu, int]] = []
    for gpu in devices:
        if len(held) == count:
            break
        descriptor = _lock(where / _file_name(gpu))
        if descriptor is not None:
            held.append((gpu, descriptor))
    if len(held) < count:
        for _, descriptor in held:
            os.close(descriptor)
        return None
    for _, descriptor in held:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    return held


def _lock(path: Path) -> int | None:
    descriptor = _open(path)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The lock of a killed job is free once its first process is gone, though a rank may still use the
        # device.
        marker = _read(path).get("marker")
        if not (isinstance(marker, str) and members(marker)):
            return descriptor
    except BlockingIOError:
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None


def _open(path: Path) -> int:
    """Open a lock file of whichever user, made where it is missing.

    Without O_CREAT where it is there: in a sticky directory that everybody may write to, Linux refuses that
    for a file of another user (`fs.protected_regular`).

    Raises:
        LeasesUnusableError: This user may neither open nor make it.
    """
    try:
        while True:
            with contextlib.suppress(FileNotFoundError):
                return os.open(path, os.O_RDWR | os.O_CLOEXEC | os.O_NOFOLLOW)
            _make(path)
    except OSError as error:
        raise _unusable(path, error) from error


def _make(path: Path) -> None:
    """Make an empty file that every user may lock: past the umask, and so before it has its name."""
    descriptor, scratch = tempfile.mkstemp(dir=path.parent)
    try:
        os.fchmod(descriptor, 0o666)
        with contextlib.suppress(FileExistsError):  # somebody else was faster
            os.link(scratch, path)
    finally:
        os.close(descriptor)
        os.unlink(scratch)


def _read(path: Path) -> dict[str, object]:
    try:
        content = parse_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # empty: released; half: being written just now
        return {}
    return content if isinstance(content, dict) else {}


def _holder(path: Path) -> str:
    known = _read(path)
    return f"{known['asset']} (process {known['pid']})" if {"asset", "pid"} <= known.keys() else "free"
