"""What a Slurm cluster is asked, through its own commands, and what it answers.

Only what works without accounting (`slurmdbd`) is used: `scontrol show job` tells of a job while it lives and
for some minutes afterwards (MinJobAge). What a job came to stands in files that it writes itself.
"""

import re
import shutil
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from vpmoe_assets.resources.launcher import LaunchError

COMMANDS = ("sbatch", "squeue", "scontrol", "scancel", "srun")
_TIMEOUT_S = 90.0
_FIELD = re.compile(r"(?:^|\s)(JobState|Reason|Restarts|NodeList)=(\S*)")

QUEUED = frozenset(
    {"PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "REQUEUE_FED", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
)
"""A job waits; no process of it runs."""
HELD = frozenset({"SUSPENDED", "STOPPED", "SIGNALING", "STAGE_OUT", "RESIZING", "COMPLETING"})
"""Its processes are there, and get nowhere."""
RUNNING = frozenset({"RUNNING"})
LOST = frozenset({"NODE_FAIL", "PREEMPTED", "TIMEOUT", "BOOT_FAIL"})
"""It was taken away: nothing is wrong with it, and it goes on from its checkpoint."""


class SlurmMissingError(LaunchError):
    """This machine cannot hand over jobs."""


class SubmitError(LaunchError):
    """Slurm refused a job; the message says why."""


class ClusterSilentError(RuntimeError):
    """The controller does not answer now; jobs go on without it."""


@dataclass(frozen=True)
class State:
    """What the cluster says of a job.

    Attributes:
        word: Slurm's, such as "RUNNING".
        reason: Why it is in that state, or "None".
        restarts: How often Slurm started it again.
        nodes: Names of its machines, as Slurm abbreviates them.
    """

    word: str
    reason: str = "None"
    restarts: int = 0
    nodes: str = ""

    @property
    def waits(self) -> bool:
        """Whether no process of it gets anywhere now."""
        return self.word in QUEUED | HELD

    @property
    def stuck(self) -> bool:
        """Whether it is queued and held, since a machine could not begin it; Slurm leaves it so for ever."""
        return self.word in QUEUED and "launch" in self.reason.lower()

    @property
    def over(self) -> bool:
        """Whether nothing of it is left, for good."""
        return self.word not in QUEUED | HELD | RUNNING


class Cluster:
    """Slurm, as the machine that this process runs on reaches it.

    Args:
        environment: Of the commands; `SLURM_CONF` may be in it.

    Raises:
        SlurmMissingError: A command is not there.
    """

    def __init__(self, environment: Mapping[str, str]) -> None:
        # A job that is handed over from inside an allocation would take its size from that one.
        self.environment = {
            name: value
            for name, value in environment.items()
            if not name.startswith(("SLURM_", "SLURMD_", "SBATCH_", "SRUN_")) or name == "SLURM_CONF"
        }
        path = self.environment.get("PATH")
        if missing := [name for name in COMMANDS if shutil.which(name, path=path) is None]:
            raise SlurmMissingError(
                f'launcher = "slurm" was asked for, and there is no {", ".join(missing)} in PATH. Start the '
                'orchestrator on a login node of the cluster, or use launcher = "local".'
            )

    def submit(self, script: Path) -> str:
        """Hand over a job script and return the job's id.

        Raises:
            SubmitError: Slurm did not take it.
        """
        try:
            done = self._run(["sbatch", "--parsable", str(script)])
        except ClusterSilentError as error:
            raise SubmitError(f"sbatch: {error}") from error
        if done.returncode != 0:
            raise SubmitError(
                f"Slurm refused the job: {_said(done)}. Change [launcher.slurm], or see `sinfo`; the script "
                f"is {script}"
            )
        return done.stdout.strip().partition(";")[0]

    def state(self, job_id: str) -> State | None:
        """Return what the cluster says of a job; None where it does not know it, or no more.

        Raises:
            ClusterSilentError: It does not answer.
        """
        done = self._run(["scontrol", "show", "job", "-o", job_id])
        if done.returncode != 0:
            if "Invalid job id" in done.stderr + done.stdout:
                return None
            raise ClusterSilentError(_said(done))
        found: dict[str, str] = {}
        for name, value in _FIELD.findall(done.stdout):
            found.setdefault(name, value)
        if "JobState" not in found:
            return None
        restarts = int(found["Restarts"]) if found.get("Restarts", "").isdigit() else 0
        return State(found["JobState"], found.get("Reason", "None"), restarts, found.get("NodeList", ""))

    def find(self, name: str) -> str | None:
        """Return the id of the job with a name, among those that are not over; None where there is none.

        Raises:
            ClusterSilentError: It does not answer.
        """
        done = self._run(["squeue", "--noheader", "--format=%A", f"--name={name}"])
        if done.returncode != 0:
            raise ClusterSilentError(_said(done))
        return next(iter(done.stdout.split()), None)

    def signal(self, job_id: str, signal: str) -> None:
        """Send a signal to the ranks of a job, and not to its script; one that has ended is left alone.

        Raises:
            ClusterSilentError: The cluster does not answer.
        """
        self._told(["scancel", f"--signal={signal}", job_id])

    def cancel(self, job_id: str) -> None:
        """End a job: it is sent SIGTERM and, after the cluster's KillWait, SIGKILL.

        Raises:
            ClusterSilentError: The cluster does not answer.
        """
        self._told(["scancel", job_id])

    def _told(self, command: Sequence[str]) -> None:
        done = self._run(command)
        text = done.stderr + done.stdout
        gone = ("Invalid job id", "already completing", "already completed", "Job/step already")
        if done.returncode != 0 and not any(words in text for words in gone):
            raise ClusterSilentError(_said(done))

    def _run(self, command: Sequence[str]) -> subprocess.CompletedProcess[str]:
        try:
            return subprocess.run(
                command,
                env=self.environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=_TIMEOUT_S,
                check=False,
                start_new_session=True,  # a Ctrl-C in the terminal is for the orchestrator
            )
        except subprocess.TimeoutExpired as error:
            raise ClusterSilentError(f"{command[0]} did not answer within {_TIMEOUT_S:.0f} s") from error


def _said(done: subprocess.CompletedProcess[str]) -> str:
    return " ".join((done.stderr or done.stdout).split()) or f"exit code {done.returncode}"
