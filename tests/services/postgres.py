"""A PostgreSQL of its own on loopback, run by a user that is not root."""

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from tests.resources.launched import TEST_ENV
from tests.services.cluster import free_ports
from tests.services.debian import program

_USER = "postgres"
_FAST = "-c fsync=off -c full_page_writes=off -c synchronous_commit=off -c max_connections=60"


class Postgres:
    """A server and one database in a directory.

    Args:
        place: An empty directory.

    Attributes:
        environment: What `deploy/team/dagster.yaml` reads.
    """

    def __init__(self, place: Path) -> None:
        self.data, self.password = place / "data", secrets.token_hex(16)
        self.log, self.place, self.port = place / "log", place, free_ports(1)[0]
        self.environment = {
            "VPMOE_PG_USER": _USER,
            "VPMOE_PG_PASSWORD": self.password,
            "VPMOE_PG_HOST": "127.0.0.1",
            "VPMOE_PG_PORT": str(self.port),
            "VPMOE_PG_DATABASE": "postgres",
        }

    def make(self) -> None:
        """Make the files of a server."""
        word = self.place / "password"
        word.write_text(self.password)
        if os.geteuid() == 0:  # PostgreSQL refuses to be run by root
            for path in (self.place, word):
                shutil.chown(path, _USER, _USER)
        self._as_user("initdb", "-D", str(self.data), "-U", _USER, "-A", "scram-sha-256", f"--pwfile={word}")
        word.unlink()

    def start(self) -> None:
        """Start it, and wait until it answers."""
        said = f"-c listen_addresses=127.0.0.1 -c port={self.port} {_FAST}"
        said += f" -c unix_socket_directories={self.place}"
        self._as_user("pg_ctl", "-D", str(self.data), "-l", str(self.log), "-w", "-o", said, "start")

    def stop(self, how: str = "immediate") -> None:
        """End it as a power cut does, or more politely."""
        self._as_user("pg_ctl", "-D", str(self.data), "-w", "-m", how, "stop")

    def _as_user(self, name: str, *arguments: str) -> None:
        found = program(name)
        assert found is not None
        command = [found, *arguments]
        if os.geteuid() == 0:
            command = ["runuser", "-u", _USER, "--", *command]
        with (self.place / f"{name}.out").open("ab") as output:
            done = subprocess.run(
                command,
                env={name: text for name, text in os.environ.items() if name != TEST_ENV},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                check=False,
                timeout=90,
            )
        assert done.returncode == 0, (self.place / f"{name}.out").read_text() + (
            self.log.read_text() if self.log.exists() else ""
        )
