"""A full disk is one line that says what to do."""

import errno

import dagster as dg
import pytest

from vpmoe_assets.assets.produced import explained
from vpmoe_assets.resources.disk import disk_trouble


def test_it_names_the_place_and_the_remedy_and_other_errors_are_not_its_own():
    full = OSError(errno.ENOSPC, "No space left on device", "/store/x")
    expected = (
        "No space left on device: /store/x; make room there and run it again: what was finished is kept"
    )
    assert disk_trouble(full) == expected
    assert disk_trouble(OSError(errno.EROFS, "Read-only file system")).startswith(
        "Read-only file system; mount"
    )
    assert disk_trouble(FileNotFoundError(errno.ENOENT, "No such file")) is None


def test_a_step_says_it_without_a_traceback():
    with (
        pytest.raises(dg.Failure, match=r"^synth: No space left on device; make room"),
        explained("synth"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(PermissionError), explained("synth"):
        raise PermissionError(errno.EACCES, "Permission denied")
