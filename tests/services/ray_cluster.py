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
        said = self.place / f"{node}.out"
        line = [*BOUND, *before, *program, *(where if head else [f"--address={self.address}"]), *options]
        for patience in (2, 1, 0):  # Ray gives a machine 30 s to start, which is little where others work
            with said.open("wb") as output:
                server = subprocess.Popen(
                    line,
                    env=environment,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
            self._nodes[node] = server

            def settled(server: subprocess.Popen[bytes] = server) -> bool:
                return b"--block" in said.read_bytes() or server.poll() is not None

            wait_until(settled, f"machine {node}", 180, said.read_text)
            if server.poll() is None:
                return
            assert patience, said.read_text()

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
