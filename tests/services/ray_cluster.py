"""A Ray cluster of two machines on this one, each with a loopback address; a token keeps others out."""

import contextlib
import os
import secrets
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import psutil

from tests.resources.launched import ROOT, TEST_ENV
from tests.services.cluster import BOUND, free_ports, wait_until

NODES = ("127.0.0.2", "127.0.0.3")
_MARK = "VPMOE_TEST_RAY"


class RayCluster:
    """Servers in a directory.

    Args:
        place: A directory with a short path: sockets have a hundred characters.

    Attributes:
        environment: What a driver needs.
    """

    def __init__(self, place: Path) -> None:
        self.place = place
        self.address = f"{NODES[0]}:{free_ports(1)[0]}"
        self.environment = {
            "RAY_ADDRESS": self.address,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(16),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._nodes: dict[str, subprocess.Popen[bytes]] = {}

    def start(self) -> None:
        """Start both machines, and wait until they are in the cluster."""
        for node in NODES:
            self.start_node(node)

    def start_node(self, node: str, *before: str) -> None:
        """Start a machine, or start it again.

        Args:
            node: Its address.
            before: What stands before the command line, such as a namespace of its own.
        """
        head = node == NODES[0]
        where = ["--head", f"--port={self.address.rpartition(':')[2]}", "--include-dashboard=false"]
        where += [f"--temp-dir={self.place}/ray"]
        options = [f"--node-ip-address={node}", "--num-cpus=1", "--object-store-memory=80000000"]
        # Ports of workers are chosen by the system: a range would meet somebody else's.
        options += ["--min-worker-port=0", "--max-worker-port=0", "--disable-usage-stats", "--block"]
        environment = {**os.environ, **self.environment, _MARK: str(self.place)}
        environment |= {"PYTHONPATH": str(ROOT), "RAY_health_check_initial_delay_ms": "1000"}
        environment |= {"RAY_health_check_period_ms": "1000", "RAY_health_check_failure_threshold": "10"}
        for name in (TEST_ENV, "RAY_ADDRESS"):
            environment.pop(name, None)
        program = [str(Path(sys.executable).with_name("ray")), "start"]
        with (self.place / f"{node}.out").open("ab") as output:
            self._nodes[node] = subprocess.Popen(
                [*BOUND, *before, *program, *(where if head else [f"--address={self.address}"]), *options],
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                start_new_session=True,
            )
        said = self.place / f"{node}.out"
        wait_until(
            lambda: b"--block" in said.read_bytes() or self._over(node), f"machine {node}", 180, said.read_text
        )
        assert not self._over(node), said.read_text()
        said.rename(said.with_suffix(".started"))

    def lose_node(self, node: str) -> None:
        """Let a machine go: its daemon is killed, and what it ran finds out by itself."""
        for process in self.processes():
            line = process.cmdline()
            if process.name() == "raylet" and f"--node_ip_address={node}" in line:
                process.kill()
        self._nodes.pop(node).wait(30)

    def workers(self, name: str) -> list[psutil.Process]:
        """Processes of Ray's that are at a task or actor of a name now."""
        found = []
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                if name in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def processes(self) -> list[psutil.Process]:
        """What this cluster started."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.environ().get(_MARK) == str(self.place):
                    found.append(process)
        return found

    def _over(self, node: str) -> bool:
        return self._nodes[node].poll() is not None

    def stop(self) -> None:
        """End both machines, and everything that they left."""
        for process in self._nodes.values():
            process.send_signal(signal.SIGTERM)
        for process in self._nodes.values():
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(15)
        for process in self.processes():
            with contextlib.suppress(psutil.Error):
                process.kill()
        wait_until(lambda: not self.processes(), "an end of the cluster", 20)
        shutil.rmtree(self.place / "ray", ignore_errors=True)
