"""Ranks on the machines of a Slurm cluster: one job, a torchrun on each machine, meeting on the first.

The orchestrator runs on a login node; store, sources and Python's environment are on a file system that it
shares with the machines, under the same paths. The cluster gives out the GPUs, so none is leased here. A job
outlives its orchestrator: whoever asks for the same work next follows it (`[launcher.slurm] on_restart`). It
is taken for ended only by what it wrote or what the cluster says, and a cluster that does not answer for a
while changes nothing. `vpmoe watch` shows it; `vpmoe reap` leaves it alone.
"""

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path

from trainer.contract.files import present
from trainer.contract.schema.base import ConfigError
from trainer.contract.status import HEARTBEAT_NAME
from vpmoe_assets.resources.detached import DetachedJob
from vpmoe_assets.resources.launcher import Launch, LaunchError
from vpmoe_assets.resources.launcher_settings import settings_of
from vpmoe_assets.resources.process_record import Orchestrator
from vpmoe_assets.resources.processes import MARKER_ENV, Interrupts, Log, ProcessesRemainError
from vpmoe_assets.resources.slurm import batch
from vpmoe_assets.resources.slurm.cluster import LOST, Cluster, ClusterSilentError, State
from vpmoe_assets.resources.slurm.settings import Layout, SlurmSettings

NAME = "slurm"
_KILL_S = 180.0
"""For Slurm to end a job by force: KillWait and the epilogue of its machines."""
_FILES_S = 30.0
"""For what a job wrote to be seen here: attributes are cached on a shared file system."""
_ALIVE_S = 120.0
_DEBOUNCE_S = 5.0


class JobLostError(LaunchError):
    """A job ended in a way that starting it again would not mend, or too often."""


@contextmanager
def reserve(launch: Launch, log: Log) -> Iterator["SlurmHandle"]:
    """Find the job that works there already, or get ready to hand one over; see `Launcher.reserve`.

    Raises:
        LaunchError: The settings do not fit, a command of Slurm is not there, or a job works there and the
            settings say `refuse`.
    """
    try:
        settings = settings_of(NAME, SlurmSettings, launch.settings, launch.environment)
        layout = settings.layout(launch.nproc, launch.device)
    except (ConfigError, ValueError) as error:
        raise LaunchError(str(error)) from error
    visible = {} if launch.device == "cuda" else {"CUDA_VISIBLE_DEVICES": ""}
    cluster = Cluster(
        {
            **launch.environment,
            **visible,
            MARKER_ENV: launch.marker,
            "PYTHONFAULTHANDLER": "1",
            "PYTHONUNBUFFERED": "1",
        }
    )
    handle = SlurmHandle(launch, settings, layout, cluster, log)
    handle.take_up()
    yield handle


def still_there(work_dir: Path, record: DetachedJob, environment: Mapping[str, str]) -> bool:
    """Say whether a job on record may still work; see `vpmoe_assets.resources.launcher.DetachingLauncher`."""
    cluster = Cluster(environment)
    try:
        job_id = record.job_id or _known(work_dir, cluster, record.name)
        state = None if job_id is None else cluster.state(job_id)
    except ClusterSilentError as error:
        raise LaunchError(f"the cluster does not answer: {error}.") from error
    return state is not None and not state.over


def _known(work_dir: Path, cluster: Cluster, name: str) -> str | None:
    """Return the id of a job whose id was never noted: it says it itself, or the cluster knows its name."""
    began = batch.began(work_dir)
    return cluster.find(name) if began is None else began.job_id


@dataclass
class SlurmHandle:
    """A job of the cluster.

    Attributes:
        launch: The start.
        settings: Of this launcher.
        layout: Of the ranks.
        cluster: That it is handed over to.
        log: Told what becomes of it.
        job: On record, once it is handed over, or was by somebody else.
        attached: Whether it was handed over by somebody else, and is followed.
    """

    launch: Launch
    settings: SlurmSettings
    layout: Layout
    cluster: Cluster
    log: Log
    job: DetachedJob | None = None
    attached: bool = False
    _waits: bool = field(default=True)
    _due: float = field(default=0.0)
    _queued_since: float = field(default_factory=time.monotonic)
    _ended_since: float | None = field(default=None)
    _silent: bool = field(default=False)
    _seen: State | None = field(default=None)

    @property
    def devices(self) -> tuple[str, ...]:
        """Product names of the GPUs that the job has noted."""
        return batch.devices(self.launch.work_dir)

    @property
    def waiting(self) -> bool:
        """Whether the job is queued, or held by the cluster."""
        return self._waits

    def take_up(self) -> None:
        """Find out what became of a job that was handed over before, and do with it as the settings say.

        Raises:
            LaunchError: One works there, and is to be left alone or cannot be asked after.
        """
        work_dir = self.launch.work_dir
        try:
            found = DetachedJob.read(work_dir)
            if found is None or found.launcher != NAME:
                return
            if found.job_id is None:  # whoever handed it over died before its id was known
                job_id = _known(work_dir, self.cluster, found.name)
                if job_id is None:
                    DetachedJob.remove(work_dir)
                    return
                found = replace(found, job_id=job_id)
            assert found.job_id is not None
            state = self.cluster.state(found.job_id)
        except ValueError as error:
            raise LaunchError(str(error)) from error
        except ClusterSilentError as error:
            raise LaunchError(
                f"a job of Slurm is on record in {work_dir}, and the cluster does not answer: {error}. Try "
                "again when `squeue` does."
            ) from error
        if state is None or state.over:
            said = batch.ended(work_dir)
            if said is not None and said.job_id == found.job_id and said.code == 0:
                self.job, self.attached = found, True  # it has done all there is to do meanwhile
            else:
                DetachedJob.remove(work_dir)
            return
        named = f"job {found.job_id} of Slurm, which process {found.orchestrator.pid} on host "
        named += f"{found.orchestrator.host} handed over, is {state.word.lower()} in {work_dir}"
        if self.settings.on_restart == "refuse":
            raise LaunchError(
                f'{named}, and [launcher.slurm] on_restart = "refuse". Follow it with "reattach", or end it '
                f"with `scancel --signal=INT {found.job_id}` and `scancel {found.job_id}`"
            )
        self.job = found
        if self.settings.on_restart == "cancel":
            self.log(f"{named}; it is ended, and started anew from its checkpoint")
            self.stop(grace_s=self.launch.grace_s, log=self.log)
            return
        self.attached = True
        self.log(f"{named}; it is followed")
        if found.nproc != self.launch.nproc:
            self.log(f"it goes on with {found.nproc} ranks, as it was handed over")
        replace(found, orchestrator=Orchestrator.this()).write(work_dir)

    def start(self) -> None:
        """Hand the job over, unless it is there already.

        Raises:
            SubmitError: Slurm refused it.
        """
        if self.job is None:
            self._hand_over(restarts=0)

    def _hand_over(self, restarts: int) -> None:
        launch = self.launch
        name = f"vpmoe-{launch.asset}-{launch.marker[:12]}-{restarts}"
        left = max(0, self.settings.restarts - restarts)
        script = batch.write(launch, name, self.settings, self.layout, left)
        record = DetachedJob(
            launcher=NAME,
            name=name,
            job_id=None,
            asset=launch.asset,
            nproc=launch.nproc,
            nodes=self.layout.nodes,
            device=launch.device,
            orchestrator=Orchestrator.this(),
            dagster_run_id=launch.dagster_run_id,
            restarts=restarts,
        )
        # Before it is handed over: whoever dies in between, its name is enough to find it.
        record.write(launch.work_dir)
        self.job = record
        try:
            job_id = self.cluster.submit(script)
        except LaunchError:
            self.job = None
            DetachedJob.remove(launch.work_dir)
            raise
        self.job = replace(record, job_id=job_id)
        self.job.write(launch.work_dir)
        self._waits, self._queued_since, self._ended_since, self._seen = True, time.monotonic(), None, None
        self._due = 0.0
        self.log(
            f"{launch.asset}: job {job_id} of Slurm, {launch.nproc} ranks on {self.layout.nodes} nodes; it "
            f"goes on without this process"
        )

    def poll(self) -> int | None:
        """Return the exit code that the job noted, or None while it is not over.

        Raises:
            JobLostError: It ended for a reason that starting it again would not mend, or too often.
            LaunchError: It waited too long for its turn.
        """
        if self.job is None or self.job.job_id is None:
            return None
        said = batch.ended(self.launch.work_dir)
        last = said if said is not None and said.job_id == self.job.job_id else None
        now = time.monotonic()
        if last is None and now < self._due:
            return None
        self._due = now + self.settings.poll_s
        try:
            state = self.cluster.state(self.job.job_id)
        except ClusterSilentError as error:
            if last is not None:
                return last.code
            if not self._silent:
                self.log(f"the cluster does not answer, and the job goes on without it: {error}")
            self._silent = True
            return None
        self._silent = False
        if last is not None and (state is None or state.over or state.restarts <= last.restart):
            self._waits = False
            return last.code
        if state is not None and not state.over:
            self._follow(state, now)
            return None
        return self._gone(state, now)

    def _follow(self, state: State, now: float) -> None:
        """Note what a job that is not over is at.

        Raises:
            LaunchError: It waited too long for its turn.
        """
        assert self.job is not None
        assert self.job.job_id is not None
        before, self._seen, self._ended_since = self._seen, state, None
        self._waits = state.waits
        job = f"job {self.job.job_id} of Slurm"
        if before is not None and state.restarts > before.restarts:
            self.log(f"{job} was queued again by the cluster; it goes on from its last checkpoint")
        if before is None or (before.word, before.reason) != (state.word, state.reason):
            on = f" on {state.nodes}" if state.nodes not in ("", "(null)") else ""
            why = f" ({state.reason})" if state.reason != "None" else ""
            self.log(f"{job} is {state.word.lower()}{on}{why}")
        if not state.waits:
            self._queued_since = now
        elif state.stuck:
            self.cluster.cancel(self.job.job_id)
            self._again(f"is held ({state.reason})")
        elif now - self._queued_since > self.launch.wait_s:
            raise LaunchError(
                f"{job} has waited {now - self._queued_since:.0f} s ({state.reason}), longer than "
                f"lease_wait_s = {self.launch.wait_s:g}, and is cancelled. Raise that, or see `squeue`."
            )

    def _gone(self, state: State | None, now: float) -> int | None:
        """Decide about a job that is over, and has not said how."""
        assert self.job is not None
        if self._ended_since is None:
            self._ended_since = now
        if now - self._ended_since < _FILES_S and (state is None or state.word in ("COMPLETED", "FAILED")):
            self._due = now + min(1.0, self.settings.poll_s)  # its last word may be on its way
            return None
        job, word = f"job {self.job.job_id} of Slurm", "forgotten" if state is None else state.word
        if state is None and self._beats():
            return None  # a controller that lost its state; the job has not
        if state is None or word in LOST:
            self._again(f"ended as {word}")
            return None
        began = batch.began(self.launch.work_dir)
        if began is None or began.job_id != self.job.job_id:
            raise JobLostError(
                f"{job} ended as {word} before it began. The machines have to see {self.launch.work_dir} and "
                f"{self.launch.sources} under these paths: put VPMOE_ARTIFACTS on a shared file system."
            )
        if word in ("COMPLETED", "FAILED"):
            if began.restart < state.restarts:
                # A machine on which it has just ended may refuse it ("Job credential revoked"), which Slurm
                # calls COMPLETED; what lies in the work directory was said by the start before.
                self._again(f"ended as {word} before it began again")
                return None
            return 1
        raise JobLostError(f"{job} ended as {word}: {_REMEDIES.get(word, 'see `scontrol show job`')}.")

    def _again(self, why: str) -> None:
        """Hand the job over once more."""
        assert self.job is not None
        job, allowed = f"job {self.job.job_id} of Slurm", self.settings.restarts
        if self.job.restarts >= allowed:
            raise JobLostError(
                f"{job} {why}, once more than [launcher.slurm] restarts = {allowed} allows. Raise that, or "
                "see `sinfo -R`."
            )
        self.log(f"{job} {why}; it is handed over again, and goes on from its last checkpoint")
        self._hand_over(self.job.restarts + 1)

    def _beats(self) -> bool:
        try:
            work_dir = self.launch.work_dir  # written by another machine, whose clock may be another
            return present(work_dir) - (work_dir / HEARTBEAT_NAME).stat().st_mtime < _ALIVE_S
        except FileNotFoundError:
            return False

    def stop(self, *, grace_s: float, stack: bool = False, log: Log) -> str:
        """See `vpmoe_assets.resources.launcher.Handle`."""
        if self.job is None:
            return "none"
        work_dir, needed = self.launch.work_dir, "none"
        with Interrupts() as interrupts:
            begun = time.monotonic()
            job_id = self.job.job_id or self._found()
            if job_id is not None:
                ending = _Ending(self.cluster, job_id, interrupts, begun)
                needed = ending.end(work_dir, grace_s=grace_s, stack=stack, log=log)
            DetachedJob.remove(work_dir)
            self.job = None
        return needed

    def _found(self) -> str | None:
        assert self.job is not None
        try:
            return _known(self.launch.work_dir, self.cluster, self.job.name)
        except ClusterSilentError as error:
            raise ProcessesRemainError(
                f"{self.job.name} may be in the cluster, which does not answer: {error}. End it with "
                f"`scancel --name={self.job.name}`."
            ) from error


_REMEDIES = {
    "CANCELLED": "somebody cancelled it with `scancel`; run it again to go on from its checkpoint",
    "OUT_OF_MEMORY": "raise [launcher.slurm] memory, or spread it over more nodes",
    "REVOKED": 'another cluster of the federation has begun it; name one, directives = ["--clusters=…"]',
    "DEADLINE": "remove the deadline from [launcher.slurm] directives",
}


@dataclass
class _Ending:
    """One job on its way out."""

    cluster: Cluster
    job_id: str
    interrupts: Interrupts
    begun: float

    def end(self, work_dir: Path, *, grace_s: float, stack: bool, log: Log) -> str:
        """End it; returns when the cluster says that nothing of it is left.

        Raises:
            ProcessesRemainError: It is still there, or the cluster does not answer.
        """
        needed = "none"
        try:
            state = self._state()
            if state is None or state.over:
                return needed
            (work_dir / batch.PLACE).mkdir(exist_ok=True)
            (work_dir / batch.PLACE / batch.STOP).touch()  # it is not to queue itself again
            if batch.ended(work_dir) is not None or state.word == "COMPLETING":
                if self._left(_KILL_S):
                    return needed
            elif not state.waits:
                self.cluster.signal(self.job_id, "INT")
                log(f"Sent SIGINT to job {self.job_id}; it has {grace_s:g} s to write a checkpoint and exit.")
                needed = "SIGINT"
                if self._left(grace_s):
                    return needed
                if stack:
                    self.cluster.signal(self.job_id, "ABRT")
                    self._left(2.0)
            log(f"Cancelling job {self.job_id} of Slurm")
            self.cluster.cancel(self.job_id)
            needed = "SIGTERM"
            if self._left(_KILL_S, hurry=False):
                return needed
        except ClusterSilentError as error:
            said = batch.ended(work_dir)
            if said is not None and said.job_id == self.job_id:
                log(f"job {self.job_id} has said its last, and the cluster does not answer: {error}")
                return needed
            raise ProcessesRemainError(
                f"job {self.job_id} of Slurm may still run, and the cluster does not answer: {error}. Its "
                f"record stays; end it with `scancel {self.job_id}`."
            ) from error
        raise ProcessesRemainError(
            f"job {self.job_id} of Slurm is still there {_KILL_S:.0f} s after `scancel`; see `scontrol show "
            f"job {self.job_id}`. Its record stays."
        )

    def _left(self, patience_s: float, *, hurry: bool = True) -> bool:
        """Wait until nothing of it is left; a second interrupt ends the wait where it may hurry."""
        begun = time.monotonic()
        deadline = begun + patience_s
        while (state := self._state()) is not None and not state.over:
            now = time.monotonic()
            if now >= deadline or (hurry and self.interrupts.later_than(begun + _DEBOUNCE_S)):
                return False
            time.sleep(min(1.0, deadline - now))
        return True

    def _state(self) -> State | None:
        """Ask, and ask again for a minute where nobody answers."""
        deadline = time.monotonic() + 60.0
        while True:
            try:
                return self.cluster.state(self.job_id)
            except ClusterSilentError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(2.0)
