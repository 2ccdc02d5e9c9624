"""What present code and recipes would make, for pages of a server that outlives the code it began with.

What it takes to know that is found out by a process of its own, from the sources as they are by then, and is
remembered in the store. Until it is there, and where no experiment of that name can be loaded, only newer
inputs count, and the page says so.
"""

import contextlib
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Hashable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.latest import Latest
from vpmoe_assets.lineage.reasons import Reasons
from vpmoe_assets.lineage.remembered import StepMemory, present_key, recorded_steps
from vpmoe_assets.lineage.staleness import Cause, Standing, standings, unfolded
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.project import ROOT, experiment_name

_LOOK_AGAIN_S = 1.0
_SOURCES = ("trainer", "vpmoe_assets", "configs")


@dataclass(frozen=True)
class Compared:
    """Where the assets of an experiment stand.

    Attributes:
        found: By bare name.
        note: What a reader has to know of it; empty where everything was compared.
        busy: Whether more is being found out.
        reasons: That name the functions which changed; None where the present sources were not compared.
    """

    found: Mapping[str, Standing]
    note: str = ""
    busy: bool = False
    reasons: Reasons | None = None
    _causes: dict[str, tuple[Cause, ...]] = field(default_factory=dict, compare=False)

    def causes(self, asset: str) -> tuple[Cause, ...]:
        """Return the causes of an asset's state to their roots, as `vpmoe why` has them."""
        if asset not in self.found:
            return ()
        if asset not in self._causes:
            told = unfolded(self.found, asset) if self.reasons is None else self.reasons.of(asset)
            self._causes[asset] = told
        return self._causes[asset]


@dataclass
class ByInputs:
    """The standings where code and recipes count as unchanged.

    Attributes:
        store: The store.
    """

    store: Store

    def of(self, latest: Latest) -> Compared:
        """Return where every asset of an experiment stands by its inputs."""
        steps = recorded_steps(latest)
        return Compared(standings(self.store, latest.experiment, steps, latest=latest))

    def state(self, experiment: str) -> Hashable:
        """Return nothing: the answer depends on the store alone."""
        return None


@dataclass
class Comparison:
    """The standings of a store's experiments, as the sources are when they are asked for.

    Attributes:
        store: The store.
        patience_s: How long an answer waits for what is being found out.
        find: Has the code location of an experiment loaded, in place of a process of its own.
    """

    store: Store
    patience_s: float = 0.0
    find: Callable[[str], None] | None = None
    _signature: tuple[object, ...] = ()
    _looked: float = float("-inf")
    _tree: SourceTree | None = None
    _finding: dict[str, threading.Thread] = field(default_factory=dict)
    _process: subprocess.Popen[bytes] | None = None
    _closed: bool = False
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def of(self, latest: Latest) -> Compared:
        """Return where every asset of an experiment stands."""
        experiment = latest.experiment
        named = self._named(experiment)
        key = present_key(self._sources(), named)
        memory = StepMemory(self._memory)
        present = memory.recall(key)
        if present is None:
            if key not in self._finding:
                thread = threading.Thread(target=self._find, args=(named,), name="comparison", daemon=True)
                self._finding = {key: thread}
                thread.start()
            self._finding[key].join(self.patience_s)
            present = memory.recall(key)
        if present is not None and present.experiment == experiment:
            steps, strict = present.steps, present.strict
            found = standings(self.store, experiment, steps, strict=strict, latest=latest)
            return Compared(found, reasons=Reasons(self.store, found, self._sources()))
        busy = key in self._finding and self._finding[key].is_alive()
        note = (
            "Code and recipes are being compared; until then only newer inputs count."
            if busy
            else f"Compared with newer inputs alone: what {experiment} would make now is not known here."
        )
        return replace(ByInputs(self.store).of(latest), note=note, busy=busy)

    def state(self, experiment: str) -> Hashable:
        """Return what an answer depends on beside the store: while it is the same, so is the answer."""
        tree = self._sources()
        busy = any(thread.is_alive() for thread in self._finding.values())
        saved = []
        for path in (self._memory, Path(self._named(experiment))):
            with contextlib.suppress(OSError):
                saved.append(path.stat().st_mtime_ns)
        return id(tree), self._signature, busy, tuple(saved)

    @property
    def _memory(self) -> Path:
        return self.store.root / ".work" / "steps.json"

    def _named(self, experiment: str) -> str:
        """Return how an experiment is asked for: the one in force may be a file of another name."""
        in_force = experiment_name()
        if in_force.endswith(".toml") and Path(in_force).stem == experiment:
            return in_force
        return experiment

    def _sources(self) -> SourceTree:
        """Return the sources as they are: read again where a file was saved since."""
        if self._tree is None or time.monotonic() - self._looked > _LOOK_AGAIN_S:
            signature = tuple(_saved(ROOT))
            if self._tree is None or signature != self._signature:
                self._tree, self._signature = SourceTree(), signature
            self._looked = time.monotonic()
        return self._tree

    def close(self) -> None:
        """End what is being found out."""
        with self._lock:
            self._closed = True
            process = self._process
        if process is not None:
            process.terminate()
            process.wait()

    def _find(self, named: str) -> None:
        """Have the code location loaded, which leaves what it finds in the store."""
        if self.find is not None:
            self.find(named)
            return
        with self._lock:
            if self._closed:
                return
            self._process = subprocess.Popen(
                [sys.executable, "-m", "vpmoe_assets.cli", "ls", "--json", "--experiment", named],
                cwd=None if named.endswith(".toml") else ROOT,
                env=os.environ | {"VPMOE_ARTIFACTS": str(self.store.root)},
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
            )
        self._process.wait()


def _saved(root: Path) -> list[tuple[str, int, int]]:
    """Return path, size and time of every source file."""
    found = []
    for package in _SOURCES:
        for directory, below, files in os.walk(root / package):
            below[:] = [name for name in below if name != "__pycache__"]
            for name in files:
                status = os.stat(os.path.join(directory, name))
                found.append((os.path.join(directory, name), status.st_size, status.st_mtime_ns))
    return sorted(found)
