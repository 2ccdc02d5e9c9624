"""GPU leases, with invented devices: everything but the list of devices is real."""

import multiprocessing
import os
import shutil
import stat
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from vpmoe_assets.resources.leases import (
    Gpu,
    GpusBusyError,
    LeasesUnusableError,
    NoGpuError,
    lease,
    lease_dir,
    list_gpus,
    visible,
)
from vpmoe_assets.resources.processes import MARKER_ENV

GPUS = [Gpu(f"GPU-{n}{n}{n}", "Invented") for n in range(4)]


def holder(asset: str = "smoke/vpmoe_stage1", marker: str = "nobody") -> dict[str, object]:
    return {"marker": marker, "asset": asset, "pid": os.getpid()}


def leased(count: int, *, wait_s: float = 0.0, **more: object):
    return lease(count, holder=holder(), wait_s=wait_s, gpus=lambda: GPUS, **more)


def test_a_lease_names_its_devices_by_uuid_and_two_leases_share_none() -> None:
    with leased(2) as one, leased(2) as two:
        assert one.environment == {"CUDA_VISIBLE_DEVICES": "GPU-000,GPU-111"}
        assert two.environment == {"CUDA_VISIBLE_DEVICES": "GPU-222,GPU-333"}


def test_a_cpu_job_sees_no_gpu_and_locks_nothing() -> None:
    with lease(0, holder=holder(), wait_s=0.0, gpus=lambda: pytest.fail("no device is looked at")) as none:
        assert none.environment == {"CUDA_VISIBLE_DEVICES": ""}
    assert not lease_dir().exists()


def test_more_devices_than_there_are_is_refused_with_a_remedy() -> None:
    with pytest.raises(NoGpuError, match=r"nproc = 5 asks for 5 GPU\(s\).*found 4.*Lower nproc"), leased(5):
        pass


def test_busy_devices_are_refused_and_the_holder_is_named() -> None:
    with leased(3), pytest.raises(GpusBusyError, match="smoke/vpmoe_stage1") as error, leased(2):
        pass
    assert f"process {os.getpid()}" in str(error.value)
    assert "GPU-333: free" in str(error.value)


def test_a_refused_lease_keeps_none_of_the_devices_it_could_have_had() -> None:
    with leased(3):
        with pytest.raises(GpusBusyError), leased(2):
            pass
        with leased(1) as rest:
            assert rest.gpus == (GPUS[3],)


def test_a_lease_ends_with_an_exception() -> None:
    with pytest.raises(KeyboardInterrupt), leased(4):
        raise KeyboardInterrupt
    with leased(4):
        pass


def test_waiting_ends_when_the_devices_become_free() -> None:
    messages: list[str] = []
    release = threading.Event()

    def hold() -> None:
        with leased(4):
            held.set()
            release.wait(10)

    held = threading.Event()
    thread = threading.Thread(target=hold)
    thread.start()
    held.wait(10)
    threading.Timer(0.3, release.set).start()
    with leased(2, wait_s=30.0, log=messages.append) as later:
        assert len(later.gpus) == 2
    thread.join()
    assert len(messages) == 1
    assert "smoke/vpmoe_stage1" in messages[0]


def test_a_lease_outlives_its_orchestrator_as_long_as_the_job_lives() -> None:
    program = (
        "import os, subprocess, sys\n"
        "from vpmoe_assets.resources.leases import Gpu, lease\n"
        "gpus = [Gpu('GPU-000', 'x')]\n"
        "with lease(1, holder={'asset': 'a', 'pid': 1}, wait_s=0, gpus=lambda: gpus) as held:\n"
        "    child = subprocess.Popen(['sleep', '60'], pass_fds=held.descriptors, stdout=2)\n"
        "    print(child.pid, flush=True)\n"
        "    os.kill(os.getpid(), 9)\n"
    )
    root = Path(__file__).resolve().parents[2]
    died = subprocess.run([sys.executable, "-c", program], cwd=root, stdout=subprocess.PIPE, check=False)
    assert died.returncode == -9
    child = int(died.stdout)
    try:
        with pytest.raises(GpusBusyError), lease(1, holder=holder(), wait_s=0.0, gpus=lambda: GPUS[:1]):
            pass
    finally:
        os.kill(child, 9)
    deadline = time.monotonic() + 5
    while True:
        try:
            with lease(1, holder=holder(), wait_s=0.0, gpus=lambda: GPUS[:1]):
                return
        except GpusBusyError:
            assert time.monotonic() < deadline
            time.sleep(0.05)


def test_a_device_is_busy_while_a_rank_of_a_killed_job_still_runs() -> None:
    rank = subprocess.Popen(["sleep", "60"], env={**os.environ, MARKER_ENV: "killed-job"})
    try:
        lease_dir().mkdir(parents=True)
        (lease_dir() / "GPU-000.lock").write_text('{"marker": "killed-job", "asset": "smoke/x", "pid": 1}')
        with (
            pytest.raises(GpusBusyError, match="smoke/x"),
            lease(1, holder=holder(), wait_s=0.0, gpus=lambda: GPUS[:1]),
        ):
            pass
    finally:
        rank.kill()
        rank.wait()
    with lease(1, holder=holder(), wait_s=0.0, gpus=lambda: GPUS[:1]):
        pass


def test_cuda_visible_devices_narrows_what_may_be_leased() -> None:
    assert visible(GPUS, None) == GPUS
    assert visible(GPUS, "") == []
    assert visible(GPUS, "2,0") == [GPUS[2], GPUS[0]]
    assert visible(GPUS, "GPU-1") == [GPUS[1]]
    assert visible(GPUS, "MIG-abc")[0].uuid == "MIG-abc"
    with pytest.raises(NoGpuError, match="'7' is not one device"):
        visible(GPUS, "7")
    with pytest.raises(NoGpuError, match="'GPU-' is not one device"):
        visible(GPUS, "GPU-")


def test_a_machine_without_a_driver_has_no_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    import pynvml

    def fail() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "nvmlInit", fail)
    assert list_gpus() == []


def test_the_lock_file_of_another_user_is_opened_where_the_kernel_forbids_to_create_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    whole = os.open

    def protected(path: str | Path, flags: int, *arguments: int, **options: int) -> int:
        """As `fs.protected_regular` has it in a sticky directory, were every file another user's."""
        if flags & os.O_CREAT and os.path.exists(path):
            raise PermissionError(13, "Permission denied", path)
        return whole(path, flags, *arguments, **options)

    with leased(4):
        pass  # the files are there now
    monkeypatch.setattr(os, "open", protected)
    with leased(4):
        pass


def test_a_lock_file_is_for_everybody_from_its_first_moment_whatever_the_umask() -> None:
    before = os.umask(0o077)
    try:
        with leased(1):
            mode = (lease_dir() / "GPU-000.lock").stat().st_mode
            assert stat.S_IMODE(mode) == 0o666
            assert stat.S_IMODE(lease_dir().stat().st_mode) == 0o1777
            assert [path.name for path in lease_dir().iterdir()] == ["GPU-000.lock"]
    finally:
        os.umask(before)


def test_two_who_make_a_lock_file_at_once_lock_the_same_one(monkeypatch: pytest.MonkeyPatch) -> None:
    link = os.link

    def late(source: str, target: Path) -> None:
        monkeypatch.setattr(os, "link", link)
        with leased(1):  # somebody is faster, and holds it
            link(source, lease_dir() / "taken-in-between")
        with pytest.raises(FileExistsError):
            link(source, target)
        raise FileExistsError

    monkeypatch.setattr(os, "link", late)
    with leased(1), pytest.raises(GpusBusyError), lease(1, holder=holder(), wait_s=0, gpus=lambda: GPUS[:1]):
        pass


@pytest.fixture
def common_directory() -> Iterator[Path]:
    """A directory below one that every user may enter, which pytest's own are not."""
    top = Path(tempfile.mkdtemp())
    top.chmod(0o1777)
    yield top / "leases"
    shutil.rmtree(top)


as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can be several users")


def as_user(number: int, work: Callable[[], None]) -> int:
    """Do something in a forked process of another user; return its exit code."""

    def run() -> None:
        os.setgroups([])
        os.setgid(number)
        os.setuid(number)
        work()

    process = multiprocessing.get_context("fork").Process(target=run)
    process.start()
    process.join(60)
    assert process.exitcode is not None
    return process.exitcode


@as_root
def test_users_take_turns_with_the_lock_files_of_each_other(common_directory: Path) -> None:
    def take_all() -> None:
        with leased(4, directory=common_directory):
            pass

    def take_one() -> None:
        with leased(1, directory=common_directory):
            pass

    assert as_user(65534, take_one) == 0  # makes the directory and one file
    assert as_user(65533, take_all) == 0  # makes the other three
    assert as_user(65534, take_all) == 0  # the directory is its own, these three are not
    assert as_user(0, take_all) == 0
    with leased(1, directory=common_directory):
        assert as_user(65533, take_all) != 0


@as_root
def test_a_file_that_a_user_may_not_open_is_named_with_the_remedy(common_directory: Path) -> None:
    common_directory.mkdir()
    (common_directory / "GPU-000.lock").touch(0o600)

    def refused() -> None:
        with (
            pytest.raises(LeasesUnusableError, match=r"GPU-000\.lock.*VPMOE_LEASE_DIR"),
            leased(1, directory=common_directory),
        ):
            pass

    assert as_user(65534, refused) == 0
