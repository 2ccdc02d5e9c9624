"""What has to be true of a site after a fault, when its asset has been made all the same."""

import contextlib
import fcntl
import json
import os
import re
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests.faults.experiment import NAME
from tests.faults.site import Lab, Site
from tests.resources.launched import carrying
from vpmoe_assets.lineage.record import RECORD_NAME

_ENDING_S = 3.0
_VARIES = re.compile(r"\b[0-9a-f]{2}(?=/|$)|[0-9a-f]{8,}|\d+")
"""Parts of paths that differ from run to run: digests, ids, numbers."""


class Judge:
    """Knows what an undisturbed run leaves.

    Args:
        lab: With everything made.
        digests: Of every asset.
    """

    def __init__(self, lab: Lab, digests: dict[str, str]) -> None:
        self.lab, self.digests = lab, digests
        finished = lab.before("finished")
        self.names = set(_names(finished.root))
        self.said = {asset: _statements(finished, asset) for asset in digests}

    def wrong(self, site: Site, asset: str, *, checks: bool) -> list[str]:
        """Return what is not as it has to be.

        Args:
            site: Where the fault was.
            asset: That was disturbed; all before it are there too.
            checks: Whether everything is verified and checked again, or its ancestry verified only.
        """
        found = [f"process {each}" for each in self._processes()]
        found += self._content(site, asset)
        found += [f"left over: {name}" for name in sorted(set(_names(site.root)) - self.names)]
        found += _held(site)
        found += _open_runs(site)
        found += self._verified(site, asset, checks)
        return found

    def _processes(self) -> list[str]:
        """Programs of the experiment that are still there: none may be, moments after the last has ended."""
        end = time.monotonic() + _ENDING_S
        while left := [*self.lab.programs(), *carrying(self.lab.id)]:
            if time.monotonic() > end:
                return [_described(process) for process in left]
            time.sleep(0.05)
        return []

    def _content(self, site: Site, asset: str) -> Iterator[str]:
        made = site.digests()
        if asset not in made:
            yield f"{asset} is lost"
        for name, digest in made.items():
            if digest != self.digests[name]:
                yield f"{name} has digest {digest}, not {self.digests[name]}"
        for name in made:
            heads, damaged = site.store.scan(NAME, name)
            if len(heads) != 1 or damaged:
                yield f"{name} has versions {[head.version for head in heads]}, damaged {damaged}"
            said = _statements(site, name) - self.said[name]
            if twice := {key: count for key, count in said.items() if key[0] == "verdict"}:
                yield f"{name}: said more often than undisturbed: {twice}"
            record = site.store.find(NAME, name)
            metrics = site.store.directory(record) / "run" / "metrics.jsonl" if record else Path()
            if metrics.is_file():
                steps = [json.loads(line)["step"] for line in metrics.read_text().splitlines()]
                if len(set(steps)) != len(steps):
                    yield f"{name}: steps {steps} in metrics.jsonl"

    def _verified(self, site: Site, asset: str, checks: bool) -> list[str]:
        only = [] if checks else ["--without-checks", asset]
        program = site.vpmoe("verify", "--deep", "--json", *only)
        code = program.wait()
        if code == 0 and "its checks were not run again" not in program.said():
            return []
        try:
            problems = json.loads(program.output.read_text())["problems"]
        except ValueError:
            return [f"verify ended with {code}: {program.said()[-500:]}"]
        return [f"verify: {problem}" for problem in problems]


def _names(root: Path) -> Iterator[str]:
    """Yield what lies in a store, and in the directory of leases, without what varies."""
    for top in (root / "artifacts", root / "leases"):
        for directory, directories, files in os.walk(top):
            place = Path(directory)
            if RECORD_NAME in files or "checkpoints" in place.parts:
                directories.clear()  # a published version: verify looks into it
                continue
            if place.name == ".sources":
                directories.clear()  # laid out of an object, and compared with it whenever they are used
            for name in files + directories:
                yield _VARIES.sub("#", (place / name).relative_to(root).as_posix())


def _statements(site: Site, asset: str) -> Counter[tuple[str, str]]:
    record = site.store.find(NAME, asset)
    assert record is not None
    said = site.store.statements.about(record)
    return Counter((each.kind, str(each.body.get("check", ""))) for each in said)


def _held(site: Site) -> Iterator[str]:
    """Yield every lock that somebody holds."""
    for path in [*(site.root / "artifacts").rglob("*.lock"), *(site.root / "leases").glob("*.lock")]:
        with path.open("rb") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                yield f"held: {path}"


def _open_runs(site: Site) -> Iterator[str]:
    with site.instance() as instance:
        for run in instance.get_runs():
            # A run that was killed before our code was reached (a tenth of a second) holds nothing.
            if not run.is_finished and instance.get_run_step_stats(run.run_id):
                yield f"run {run.run_id} is {run.status}"
        for pool in instance.event_log_storage.get_concurrency_keys():
            info = instance.event_log_storage.get_concurrency_info(pool)
            if info.active_slot_count or info.pending_step_count:
                yield f"slot of pool {pool}: {info}"


def _described(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.Error):
        return f"{process.pid} {process.name()}: {' '.join(process.cmdline())[:100]}"
    return f"{process.pid}, gone meanwhile"
