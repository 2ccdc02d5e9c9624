"""A Slurm cluster of two virtual machines on this one, with files and ports of its own."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil

from tests.resources.launched import TEST_ENV
from tests.services.debian import program
from vpmoe_assets.resources import bound

NODES = ("n0", "n1")
BOUND = [sys.executable, "-I", "-S", str(bound.__file__), "SIGTERM"]
"""Before a server's command line: it ends with the tests, however they end."""
_CONF = """\
ClusterName=vpmoetest
SlurmctldHost={host}(127.0.0.1)
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={place}/munge.socket
SlurmUser=root
SlurmdUser=root
StateSaveLocation={place}/state
SlurmdSpoolDir={place}/spool.%n
SlurmctldPidFile={place}/slurmctld.pid
SlurmdPidFile={place}/slurmd.%n.pid
SlurmctldLogFile={place}/slurmctld.log
SlurmdLogFile={place}/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU
SlurmdParameters=config_overrides
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,sched_min_interval=0
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
ReturnToService=1
SlurmdTimeout=10
KillWait=4
MessageTimeout=10
MinJobAge=300
CompleteWait=0
PropagateResourceLimitsExcept=ALL
NodeName=n0 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=4 RealMemory=1000 State=UNKNOWN
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=4 RealMemory=1000 State=UNKNOWN
PartitionName=main Nodes=n[0-1] Default=YES MaxTime=INFINITE State=UP PriorityTier=1 GraceTime=30
PartitionName=urgent Nodes=n[0-1] MaxTime=INFINITE State=UP PriorityTier=2
"""


def free_ports(count: int) -> list[int]:
    """Ports of loopback that nobody listens at."""
    with contextlib.ExitStack() as held:
        sockets = [held.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]


class Cluster:
    """Servers in a directory.

    Args:
        place: A directory of root's.

    Attributes:
        environment: What the commands of Slurm need.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.environment = {"SLURM_CONF": str(place / "slurm.conf")}
        self._servers: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start all servers, and wait until both machines can be used."""
        place = self.place
        for name in ("state", *(f"spool.{node}" for node in NODES)):
            (place / name).mkdir(exist_ok=True)
        host = socket.gethostname().partition(".")[0]
        conf = _CONF.format(host=host, place=place, ports=free_ports(3))
        (place / "slurm.conf").write_text(conf)
        (place / "cgroup.conf").write_text("CgroupPlugin=cgroup/v1\nCgroupAutomount=no\n")
        key = place / "munge.key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o400)
        munge = ["--foreground", "--force", f"--key-file={key}", f"--socket={place}/munge.socket"]
        munge += [f"--{name}-file={place}/munge.{name}" for name in ("pid", "log", "seed")]
        self._serve("munged", *munge)
        wait_until(lambda: (place / "munge.socket").exists(), "munged", 20)
        self.start_controller()
        for node in NODES:
            self.start_node(node)
        self.wait_idle()

    def start_controller(self) -> None:
        """Start the controller, or start it again."""
        self._serve("slurmctld", "-D", "-f", str(self.place / "slurm.conf"))
        wait_until(lambda: "is UP" in self.ask("scontrol", "ping"), "slurmctld", 30)

    def stop_controller(self) -> None:
        """End the controller; jobs go on."""
        server = self._servers.pop("slurmctld")
        server.terminate()
        server.wait(30)

    def start_node(self, node: str) -> None:
        """Start a machine, or start it again."""
        self._serve(f"slurmd.{node}", "-D", "-N", node, "-f", str(self.place / "slurm.conf"))

    def lose_node(self, node: str) -> None:
        """Let a machine go, with everything that runs on it, as a power cut does."""
        server = self._servers.pop(f"slurmd.{node}")
        # Steps leave the session of their server: they are found by the machine that they are told to be on.
        left = [psutil.Process(server.pid)]
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                conf = process.environ().get("SLURM_CONF", "")
                own = process.environ().get("SLURMD_NODENAME") == node or (
                    process.name() == "slurmstepd" and self._steps_on(process, node)
                )
                if conf.startswith(str(self.place)) and own:
                    left.append(process)
        for process in left:
            with contextlib.suppress(psutil.Error, OSError):
                process.kill()
        server.wait()

    @staticmethod
    def _steps_on(process: psutil.Process, node: str) -> bool:
        return any(child.environ().get("SLURMD_NODENAME") == node for child in process.children())

    def ask(self, *command: str) -> str:
        """Run a command of Slurm's and return what it says."""
        done = subprocess.run(
            command,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        return done.stdout + done.stderr

    def jobs(self) -> list[str]:
        """Ids of the jobs that are not over."""
        return self.ask("squeue", "--noheader", "--format=%A").split()

    def hasten(self) -> None:
        """Wait for a job that was queued again, and let it begin soon: Slurm waits two minutes otherwise.

        Within the second in which a machine was told that the earlier start is over it would refuse the next.
        """

        def listed(state: str) -> list[str]:
            return self.ask("squeue", "--noheader", f"--states={state}", "--format=%A").split()

        def queued() -> list[str]:
            # While its earlier start is still being cleared away, the end of that would be taken for its own.
            return [job for job in listed("PENDING") if job not in listed("COMPLETING")]

        wait_until(lambda: bool(queued()), "a job that was queued again", 120)
        for job in queued():
            self.ask("scontrol", "update", f"jobid={job}", "StartTime=now+7")

    def wait_idle(self) -> None:
        """Wait until both machines can be used and no job is left."""
        names = ",".join(NODES)

        def idle() -> bool:
            states = self.ask("sinfo", "--noheader", "-N", "-p", "main", "-n", names, "-o", "%T").split()
            return states == ["idle", "idle"] and not self.jobs()

        wait_until(idle, "two idle machines", 60, lambda: self.ask("sinfo", "-N", "-l") + self.ask("squeue"))

    def stop(self) -> None:
        """End all servers, and everything that they left."""
        for job in self.jobs():
            self.ask("scancel", "--signal=KILL", "--full", job)
            self.ask("scancel", job)
        with contextlib.suppress(AssertionError):
            wait_until(lambda: not self.jobs(), "no jobs", 20)
        for name in reversed(list(self._servers)):
            server = self._servers.pop(name)
            server.terminate()
            try:
                server.wait(10)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()
        for process in self.left():
            with contextlib.suppress(psutil.Error):
                process.kill()

    def left(self) -> list[psutil.Process]:
        """Processes that this cluster started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                conf = process.environ().get("SLURM_CONF", "")
                if conf.startswith(f"{self.place}/") and process.pid != os.getpid():
                    found.append(process)
        return found

    def _serve(self, name: str, *arguments: str) -> None:
        found = program(name.partition(".")[0])
        assert found is not None
        environment = {**os.environ, **self.environment}
        environment.pop(TEST_ENV, None)  # it outlives the test that starts it again
        # What binds it is told of the end of the thread that started it, too.
        bind = BOUND if threading.current_thread() is threading.main_thread() else []
        with (self.place / f"{name}.out").open("ab") as output:
            self._servers[name] = subprocess.Popen(
                [*bind, found, *arguments],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )


def wait_until(true, what: str, seconds: float, said=lambda: "") -> None:
    """Wait for something that comes about by itself."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, f"{what}: not within {seconds} s\n{said()}"
        time.sleep(0.2)


def kill_tree(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill a process, and nothing else: what it started goes on, or finds out by itself."""
    process.send_signal(signal.SIGKILL)
    process.wait()


def lines_of(paths: Sequence[Path]) -> str:
    """What files say, for a message."""
    return "\n".join(f"--- {path}\n{path.read_text(errors='replace')}" for path in paths if path.exists())
