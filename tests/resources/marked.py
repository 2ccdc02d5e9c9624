"""Programs that stand for the marked processes of a job, and what a dead orchestrator leaves."""

import contextlib
import subprocess
from collections.abc import Callable
from pathlib import Path

import psutil

from vpmoe_assets.resources.process_record import Orchestrator, ProcessRecord
from vpmoe_assets.resources.processes import MARKER_ENV

POLITE = """
import signal, sys, time
def leave(number, frame):
    time.sleep({seconds})
    sys.exit(0)
signal.signal(signal.SIGINT, leave)
print("ready", flush=True)
time.sleep(600)
"""
DEAF = """
import signal, time
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, signal.SIG_IGN)
print("ready", flush=True)
while True:
    time.sleep(600)
"""
# A torchrun in miniature: a child in a session of its own, which no process group reaches.
PARENT = """
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1]], start_new_session=True, stdout=sys.stdout)
sys.exit(child.wait())
"""

Start = Callable[..., subprocess.Popen[bytes]]


def process_marker(process: subprocess.Popen[bytes]) -> str:
    with contextlib.suppress(psutil.Error):
        return psutil.Process(process.pid).environ().get(MARKER_ENV, "")
    return ""


def dead_orchestrator() -> Orchestrator:
    gone = subprocess.Popen(["true"])
    orchestrator = Orchestrator(gone.pid, psutil.Process(gone.pid).create_time())
    gone.wait()
    return orchestrator


def left_behind(marker: str, work: Path, *, run_id: str | None = None, told: bool = False) -> ProcessRecord:
    work.mkdir(parents=True)
    record = ProcessRecord(marker, dead_orchestrator(), (), "vpmoe_stage1", run_id, death_signal=told)
    record.write(work)
    return record
