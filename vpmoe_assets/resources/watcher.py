"""Watching a job: its curve and log go to Dagster as they grow, and a job that hangs is noticed."""

import logging
import time
from dataclasses import dataclass

import dagster as dg

from trainer.contract.status import DONE, FAILED, INTERRUPTED
from vpmoe_assets.resources.job_files import WorkFiles
from vpmoe_assets.resources.launcher import Handle
from vpmoe_assets.resources.pulse import Pulse
from vpmoe_assets.resources.tail import LogTail, MetricsTail

_log = logging.getLogger(__name__)
_REFUSED_S = 900.0
_LOG_FIRST_S, _LOG_SLOWEST_S, _LOG_SLOWDOWN = 2.0, 60.0, 1.3
_ENDED = (DONE, FAILED, INTERRUPTED)
_SOON_S, _SOON_FOR_S = 0.05, 3.0
"""Between two looks at a job that has written how it ended, and for how long."""


class StalledError(RuntimeError):
    """The job lives and does not get on."""


@dataclass(frozen=True)
class Limits:
    """How patient a watcher is; all in seconds.

    Attributes:
        stall_s: Longest time without a heartbeat.
        progress_s: Longest time at one step or in one save while the heart beats.
        failed_s: Longest time from `STATUS` "failed" to the end of the last process. Ranks that lost a peer
            mostly hang in a collective, and torchrun waits as long for them as for a checkpoint.
        poll_s: Time between two looks.
    """

    stall_s: float
    progress_s: float
    failed_s: float
    poll_s: float


class Watcher:
    """Follows one job.

    Args:
        context: Gets observations and log messages.
        files: The job's files.
        metrics: Picks the observations.
        limits: When to give up.
    """

    def __init__(
        self, context: dg.AssetExecutionContext, files: WorkFiles, metrics: MetricsTail, limits: Limits
    ) -> None:
        self._context, self._files, self._metrics, self._limits = context, files, metrics, limits
        self._log = LogTail(files.log)
        self._log_due, self._log_every = 0.0, _LOG_FIRST_S
        self._failed_since: float | None = None
        self._ended_since: float | None = None
        self._refused_since: float | None = None
        self._pulse = Pulse(files.heartbeat)

    def follow(self, handle: Handle) -> int:
        """Watch until the job's first process has ended.

        Returns:
            Its exit code.

        Raises:
            StalledError: No heartbeat, no progress, or no end after a failure; the processes still live.
        """
        self.rest()
        while (returncode := handle.poll()) is None:
            self.look()
            if handle.waiting:
                self.rest()
            else:
                self.check()
            self._pause()
        self.look(all_of_it=True)
        return returncode

    def _pause(self) -> None:
        """Wait for the next look; a job that has written how it ended is looked at again soon."""
        until = time.monotonic() + self._limits.poll_s
        while (left := until - time.monotonic()) > 0:
            time.sleep(min(left, _SOON_S))
            if self._files.status()[0] in _ENDED:
                now = time.monotonic()
                self._ended_since = self._ended_since or now
                if now - self._ended_since < _SOON_FOR_S:
                    return

    def look(self, *, all_of_it: bool = False) -> None:
        """Pass on what is new, if anybody takes it.

        Dagster's database may be away for a while (a server is started again), and a job is not ended for
        that: what is passed on is in the job's files, too, and what comes later is passed on again.

        Args:
            all_of_it: Pass on the rest of the log, whether it is due or not.

        Raises:
            Exception: As Dagster raises it, for longer than a quarter of an hour.
        """
        try:
            self._pass_on(all_of_it)
        except Exception as error:  # each kind of storage fails in its own way
            now = time.monotonic()
            if self._refused_since is None:
                self._refused_since = now
                _log.warning("Dagster takes no events now; the job goes on: %s", error)
            elif now - self._refused_since > _REFUSED_S:
                raise
        else:
            self._refused_since = None

    def _pass_on(self, all_of_it: bool) -> None:
        """Pass on what is new. The log goes in ever larger blocks: each is a row of the event log.

        The curve of a job that makes several assets belongs to none of them and stays in its file.
        """
        keys = self._context.assets_def.keys
        if len(keys) == 1:
            for observation in self._metrics.observations(next(iter(keys))):
                self._context.log_event(observation)
        now = time.monotonic()
        if not all_of_it and now < self._log_due:
            return
        if block := self._log.block():
            self._context.log.info(block)
            self._log_every = min(_LOG_SLOWEST_S, self._log_every * _LOG_SLOWDOWN)
        self._log_due = now + self._log_every

    def rest(self) -> None:
        """Expect nothing of it until now: it is about to start, or waits for its turn."""
        self._pulse.rest()
        self._failed_since = None

    def check(self) -> None:
        """Look whether it gets on.

        Raises:
            StalledError: It does not.
        """
        beat, limits = self._pulse.beat(), self._limits
        at = f", while at {beat.phase!r} of step {beat.iteration}" if beat.phase else ""
        if beat.age_s > limits.stall_s:
            raise StalledError(
                f"no heartbeat for {beat.age_s:.0f} s (stall_timeout_s = {limits.stall_s:g}){at}"
            )
        if beat.stuck_s > limits.progress_s:
            raise StalledError(
                f"no progress for {beat.stuck_s:.0f} s (progress_timeout_s = {limits.progress_s:g}){at}"
            )
        state, reason = self._files.status()
        if state != FAILED:
            self._failed_since = None
        elif self._failed_since is None:
            self._failed_since = time.monotonic()
        elif time.monotonic() - self._failed_since > limits.failed_s:
            raise StalledError(
                f"failed ({reason}), and other processes were still there {limits.failed_s:g} s later"
            )
