"""Workers of one job behave as one job: done when all are, failed as soon as one is, and none is left."""

import json
from pathlib import Path

import pytest

from trainer.contract.status import JOB_NAME
from vpmoe_assets.resources.launcher import Launch, LaunchError
from vpmoe_assets.resources.worker_places import places
from vpmoe_assets.resources.workers import launches, reserve


class Handles:
    """A launcher whose jobs end as they are told to."""

    def __init__(self) -> None:
        self.held: list[Path] = []
        self.stopped: list[Path] = []
        self.codes: dict[Path, int | None] = {}

    def reserve(self, launch, log):
        return _Held(self, launch)


class _Held:
    attached = waiting = False

    def __init__(self, handles: Handles, launch: Launch) -> None:
        self.handles, self.launch = handles, launch
        self.devices = (f"gpu {launch.work_dir.name}",)

    def __enter__(self):
        if len(self.handles.held) == 3:
            raise LaunchError("no fourth GPU")
        self.handles.held.append(self.launch.work_dir)
        return self

    def __exit__(self, *_):
        self.handles.held.remove(self.launch.work_dir)

    def start(self):
        self.handles.codes[self.launch.work_dir] = None

    def poll(self):
        return self.handles.codes[self.launch.work_dir]

    def stop(self, *, grace_s, stack=False, log):
        self.handles.stopped.append(self.launch.work_dir)
        return "none" if self.poll() is not None else "SIGINT"


@pytest.fixture
def launch(tmp_path) -> Launch:
    (tmp_path / JOB_NAME).write_text(json.dumps({"work_dir": str(tmp_path)}))
    return Launch(
        command="score",
        experiment="tiny",
        asset="teacher_topk",
        work_dir=tmp_path,
        sources=tmp_path,
        device="cpu",
        nproc=1,
        environment={},
        marker="m",
        grace_s=1.0,
        wait_s=1.0,
    )


def test_each_worker_has_its_place_its_marker_and_its_share_of_the_same_job(launch):
    starts = launches(launch, 3)
    assert [start.work_dir for start in starts] == places(launch.work_dir)
    assert len({start.marker for start in (*starts, launch)}) == 4
    for number, start in enumerate(starts):
        assert start.trainer[-4:] == ["--shard", str(number), "--of", "3"]
        assert (start.work_dir / JOB_NAME).read_bytes() == (launch.work_dir / JOB_NAME).read_bytes()


def test_they_are_done_when_all_are_and_failed_as_soon_as_one_is(launch):
    handles, starts = Handles(), launches(launch, 3)
    with reserve(handles, starts, print) as workers:
        assert workers.devices == ("gpu 0", "gpu 1", "gpu 2")
        workers.start()
        assert workers.poll() is None
        handles.codes[starts[0].work_dir] = 0
        assert workers.poll() is None
        handles.codes[starts[2].work_dir] = -9
        assert workers.poll() == -9
        assert workers.stop(grace_s=1.0, log=print) == "SIGINT"
        handles.codes[starts[1].work_dir] = -2  # of the signal that it was sent
        assert (workers.poll(), workers.failed) == (-9, (2, -9))
    assert handles.stopped == [start.work_dir for start in starts]
    assert handles.held == []
    with reserve(handles, starts, print) as workers:
        workers.start()
        handles.codes |= dict.fromkeys((start.work_dir for start in starts), 0)
        assert (workers.poll(), workers.failed) == (0, None)


def test_what_the_first_ones_hold_is_given_back_when_the_last_gets_nothing(launch):
    handles = Handles()
    with pytest.raises(LaunchError, match="no fourth GPU"), reserve(handles, launches(launch, 4), print):
        pytest.fail("it has started")
    assert handles.held == []
