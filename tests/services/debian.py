"""The servers that tests of services start, from Debian's packages: `python -m tests.services.debian`.

Installs what is missing, where it may (root, and a Debian with apt-get that reaches a mirror). Nothing is
started by that, and the tests run servers of their own, on loopback, with files of their own. Elsewhere it
says what is missing and what is left out for it; with `VPMOE_SERVICES=required` that is an error.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

REQUIRED_ENV = "VPMOE_SERVICES"
PROGRAMS = {
    "slurm-wlm": ("slurmctld", "slurmd", "sbatch", "scontrol"),
    "munge": ("munged",),
    "postgresql": ("initdb", "postgres", "pg_ctl"),
    "bindfs": ("bindfs", "fusermount"),
}
NEEDED_BY = {
    "slurm-wlm": "jobs on Slurm",
    "munge": "jobs on Slurm",
    "postgresql": "Dagster on PostgreSQL",
    "bindfs": "a store that two machines share",
}
_MIRROR_S = 120
"""How long a mirror is waited for, in seconds: a machine without a network hears nothing at all."""
_PLACES = ("/usr/sbin", "/usr/local/sbin", "/sbin")


def program(name: str) -> str | None:
    """Where a server's program is, which need not be in PATH; None where it is not installed."""
    places = [os.environ.get("PATH", ""), *_PLACES]
    places += map(str, sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True))
    return shutil.which(name, path=os.pathsep.join(places))


def missing() -> list[str]:
    """Packages of which a program is not there."""
    return [package for package, names in PROGRAMS.items() if not all(map(program, names))]


def install(packages: list[str]) -> str:
    """Install packages; returns what went wrong, or nothing."""
    if shutil.which("apt-get") is None:
        return "this is no machine with apt-get"
    if os.geteuid() != 0:
        return "only root may install packages"
    # Nothing is started, as at the time when the machine itself is.
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive", "RUNLEVEL": "1"}
    patience = ["-o", "Acquire::Retries=1", "-o", "Acquire::http::Timeout=15", "-o", "DPkg::Lock::Timeout=60"]
    install = ["install", "-y", "--no-install-recommends", *packages]
    # What has begun to be unpacked is not interrupted, and needs no network any more.
    steps = [(["update"], _MIRROR_S), ([*install, "--download-only"], _MIRROR_S), (install, None)]
    for command, seconds in steps:
        try:
            done = subprocess.run(
                ["apt-get", "-qq", *patience, *command],
                env=environment,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                text=True,
                check=False,
                timeout=seconds,
            )
        except subprocess.TimeoutExpired:
            return f"apt-get {command[0]} took longer than {seconds} s"
        # An update that reached no mirror leaves the lists of the last one, and ends well.
        if done.returncode != 0:
            return " ".join((done.stderr or done.stdout).split()[-60:])
    return ""


def main() -> int:
    """Install what is missing, and say what still is, and what that leaves out."""
    wanted = missing()
    if not wanted:
        return 0
    print(f"installing {', '.join(wanted)}", flush=True)
    wrong = install(wanted)
    still = missing()
    if not still:
        return 0
    print(
        f"\n*** NOT INSTALLED: {', '.join(still)}: {wrong or 'a program is still not there'}.\n"
        f"*** LEFT OUT: tests of {', '.join(dict.fromkeys(map(NEEDED_BY.__getitem__, still)))}. Install the "
        "packages, or run this as root on Debian.\n",
        flush=True,
    )
    return int(os.environ.get(REQUIRED_ENV) == "required")


if __name__ == "__main__":
    sys.exit(main())
