"""Two ranks under torchrun, and every way in which their run can end: nothing is left, or the next ends it.

`tests.resources.test_cancel` has the polite ways and the UI; here a terminal is closed, and a process killed.
"""

import contextlib
import os
import pty
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from tests.resources.launched import carrying, try_all
from tests.resources.test_cancel import MATERIALIZE, PATIENCE_S, Site, wait_for
from vpmoe_assets.resources.processes import MARKER_ENV

SAVE_S = 2.0


def ranks(site: Site) -> list[psutil.Process]:
    return [each for each in carrying(site.id) if "RANK" in each.environ()]


def torchrun(site: Site) -> psutil.Process:
    (found,) = [
        each
        for each in carrying(site.id)
        if MARKER_ENV in each.environ() and "vpmoe_assets.resources.torchrun" in each.cmdline()
    ]
    return found


def close_the_terminal(site: Site) -> None:
    terminal, inside = pty.openpty()
    # It becomes the controlling terminal of the command, as in a window that somebody closes.
    with contextlib.ExitStack() as stack:
        stack.callback(os.close, inside)
        site.process = subprocess.Popen(
            # As a window starts it: a hangup that is ignored, as under `nohup`, would be handed down.
            ["env", "--default-signal=HUP", "setsid", "--ctty", "--wait", *MATERIALIZE],
            cwd=site.root,
            env=site.environment(),
            stdin=inside,
            stdout=inside,
            stderr=inside,
        )
    trained = False
    while not trained:
        with contextlib.suppress(OSError):
            os.set_blocking(terminal, False)
            os.read(terminal, 65536)
        with contextlib.suppress(FileNotFoundError):
            trained = (site.work / "metrics.jsonl").read_bytes().count(b"\n") >= 2
        assert site.process.poll() is None, "ended before it trained"
        time.sleep(0.1)
    os.close(terminal)
    site.process.wait(PATIENCE_S)
    site.assert_nothing_is_left()
    site.assert_checkpoint_is_complete()
    assert site.run().is_failure


def kill(victim: Callable[[Site], psutil.Process]) -> Callable[[Site], None]:
    """Return the way in which a process of the job is killed: the run fails and takes the others down."""

    def way(site: Site) -> None:
        process = site.materialize()
        site.wait_until_it_trains()
        victim(site).kill()
        process.wait(PATIENCE_S)
        assert process.returncode != 0
        site.assert_nothing_is_left()
        assert site.run().is_failure

    return way


def kill_and_start_again(site: Site) -> None:
    process = site.materialize()
    site.wait_until_it_trains()
    first = torchrun(site)
    process.kill()
    process.wait()
    again = site.materialize()
    wait_for(lambda: ranks(site) and not first.is_running(), "the next start to end what was left", site)
    again.send_signal(signal.SIGINT)
    again.wait(PATIENCE_S)
    site.assert_nothing_is_left()
    with site.instance() as instance:  # that of the killed process was closed by the next
        assert all(run.is_failure for run in instance.get_runs())


WAYS: dict[str, Callable[[Site], None]] = {
    "terminal": close_the_terminal,
    "torchrun": kill(torchrun),
    "first rank": kill(lambda site: next(each for each in ranks(site) if each.environ()["RANK"] == "0")),
    "second rank": kill(lambda site: next(each for each in ranks(site) if each.environ()["RANK"] == "1")),
    "next start": kill_and_start_again,
}


@pytest.mark.services
@pytest.mark.slow
@pytest.mark.timeout(700)
def test_nothing_is_left_however_a_run_of_two_ranks_ends(tmp_path: Path) -> None:
    sites = {name: Site(tmp_path / name.replace(" ", "_"), save_s=SAVE_S, nproc=2) for name in WAYS}
    try_all(WAYS, sites)
