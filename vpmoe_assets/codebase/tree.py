"""One reading of the project's sources: what is hashed, what is snapshotted and what jobs run is the same.

Every file is read once, when the tree is made, and its bytes are kept. Whatever asks later gets those bytes,
however often the file was saved since; `SourceTree.changed` says which files are not as they were read.
"""

import os
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import astuple, dataclass
from functools import cached_property
from pathlib import Path, PurePosixPath
from types import MappingProxyType

from trainer.contract.canonical import sha256_json
from vpmoe_assets.codebase.bystanders import bystander
from vpmoe_assets.codebase.closure import Closure, module_name, with_parents
from vpmoe_assets.codebase.facts import Facts
from vpmoe_assets.codebase.memory import FactsMemory
from vpmoe_assets.codebase.snapshot import pack
from vpmoe_assets.codebase.toolchain import deciding_packages
from vpmoe_assets.codebase.words import LISTED
from vpmoe_assets.project import ROOT

PACKAGES = ("trainer", "vpmoe_assets")
_CODE = (".py", ".sql")
_OTHER = ("configs/*.toml", "pyproject.toml", "requirements.lock")


def _process_started_ns() -> int:
    """Return when this process began, in Unix time; without `/proc`, when this module was loaded."""
    try:
        fields = Path("/proc/self/stat").read_text(encoding="ascii").rpartition(")")[2].split()
        age_s = time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError):
        age_s = 0.0
    return time.time_ns() - int(age_s * 1e9)


_STARTED_NS = _process_started_ns()
"""No module was imported before: what was saved since may be newer than what is running."""
_TICK_NS = 10_000_000
"""The start of a process is known to a tick, rounded down, and Python takes longer than one to begin. What
was saved before the command was given is no later than a tick after it; what was saved after an import is."""


@dataclass(frozen=True)
class Identity:
    """How a file system tells one state of a file from another."""

    inode: int
    size: int
    modified_ns: int
    changed_ns: int

    @classmethod
    def of(cls, found: os.stat_result) -> "Identity":
        """Return the identity in a file's status."""
        return cls(found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns)


class SourceTree:
    """The sources as they were at one moment.

    Args:
        root: The project.
        memory: File that remembers what was found out about a source, by its content; None remembers nothing.

    Attributes:
        root: The project.
        content: Bytes of every file by its path relative to `root`, POSIX form, sorted.
    """

    def __init__(self, root: Path = ROOT, *, memory: Path | None = None) -> None:
        self.root = root
        self._memory = FactsMemory(memory)
        self._closures: dict[tuple[str, ...], Closure] = {}
        self._lock = threading.RLock()
        read = {path: _read(root / path) for path in sorted(_paths(root))}
        found = {path: both for path, both in read.items() if both is not None}
        self.content: Mapping[str, bytes] = MappingProxyType({path: both[0] for path, both in found.items()})
        self._identity = {path: both[1] for path, both in found.items()}

    @cached_property
    def modules(self) -> Mapping[str, str]:
        """Path of every module, by dotted name."""
        return {module_name(path): path for path in self.content if path.endswith(".py")}

    @cached_property
    def archive(self) -> bytes:
        """All files as one archive; see `vpmoe_assets.codebase.snapshot`."""
        return pack(self.content)

    def facts(self, path: str) -> Facts:
        """Return what a source says of itself.

        Raises:
            SourceError: It is Python that does not parse.
        """
        return self._memory.facts(self.content[path], path)

    def closure(self, roots: Sequence[str]) -> Closure:
        """Return the code that these modules consist of.

        Args:
            roots: Dotted names of the modules that make the bytes, and of those that a recipe names. One that
                stands by elsewhere counts where it is asked for.

        Raises:
            LookupError: A root is no module of the project.
            SourceError: A file does not parse.
        """
        asked = tuple(sorted(set(roots)))
        with self._lock:
            if asked not in self._closures:
                for root in asked:
                    if root not in self.modules:
                        raise LookupError(f"{root} is no module below {self.root}")
                modules = self._reached(asked)
                facts = {self.modules[name]: self.facts(self.modules[name]) for name in sorted(modules)}
                self._closures[asked] = Closure(
                    asked,
                    {path: fact.digest for path, fact in sorted(facts.items())},
                    deciding_packages(use for fact in facts.values() for use in (*fact.uses, *fact.imports)),
                )
                self._memory.save()
            return self._closures[asked]

    def brought_along(self, modules: Iterable[str]) -> set[str]:
        """Return the modules that are loaded as soon as some are, themselves included, bystanders or not."""
        found: set[str] = set()
        waiting = [name for name in modules if name in self.modules]
        while waiting:
            name = waiting.pop()
            if name not in found:
                found.add(name)
                waiting += self._known(self.facts(self.modules[name]).eager, name)
        with self._lock:
            self._memory.save()
        return found

    def changed(self, paths: Iterable[str]) -> list[str]:
        """Return those files that are not as they were read, or may not have stayed so, sorted.

        A file that was saved and put back counts: it may have been imported in between. So does one that was
        saved after this process began and before it was read.

        Args:
            paths: Relative to the root.
        """
        return sorted(path for path in set(paths) if not self._stayed(path))

    def state(self, paths: Iterable[str]) -> str:
        """Return a digest of how the file system told these files apart from any other state of theirs.

        It differs as soon as one was saved again, be it with the same content.
        """
        known = {path: astuple(self._identity[path]) for path in sorted(set(paths))}
        return sha256_json({"root": str(self.root), "files": known})

    def _stayed(self, path: str) -> bool:
        known = self._identity.get(path)
        if known is None or (self.root == ROOT and known.changed_ns > _STARTED_NS + _TICK_NS):
            return False
        now = _read(self.root / path)
        # The content too: two saves within one tick of the clock leave the same times.
        return now is not None and now == (self.content[path], known)

    def _reached(self, roots: Iterable[str]) -> set[str]:
        asked, found = set(roots), set[str]()
        waiting = self._known(asked, None)
        while waiting:
            name = waiting.pop()
            if name not in found and (name in asked or bystander(name) is None):
                found.add(name)
                imports = self.facts(self.modules[name]).imports
                waiting += self._known([*imports, *LISTED.get(name, ())], name)
        return found

    def _known(self, names: Iterable[str], importer: str | None) -> list[str]:
        """Return the modules of this tree among dotted names, with their packages and the importer's."""
        own = [] if importer is None else [importer]
        return [name for name in with_parents([*names, *own]) if name in self.modules]


def is_source(path: str) -> bool:
    """Say whether a file of this path, relative to the project, is one of its sources."""
    pure = PurePosixPath(path)
    if pure.parts[:1] and pure.parts[0] in PACKAGES:
        return len(pure.parts) > 1 and pure.suffix in _CODE and "__pycache__" not in pure.parts
    return any(len(pure.parts) == other.count("/") + 1 and pure.match(other) for other in _OTHER)


def _paths(root: Path) -> Iterator[str]:
    for package in PACKAGES:
        for directory, below, files in os.walk(root / package):
            below[:] = sorted(name for name in below if name != "__pycache__")
            for name in files:
                if name.endswith(_CODE):
                    yield Path(directory, name).relative_to(root).as_posix()
    for pattern in _OTHER:
        for path in root.glob(pattern):
            if path.is_file():
                yield path.relative_to(root).as_posix()


def _read(path: Path) -> tuple[bytes, Identity] | None:
    """Return a file's bytes and identity, the same before and after they were read; None without a file."""
    while True:
        try:
            with path.open("rb") as file:
                before = Identity.of(os.fstat(file.fileno()))
                content = file.read()
                after = Identity.of(os.fstat(file.fileno()))
        except FileNotFoundError:
            return None
        if before == after and len(content) == after.size:
            return content, after


MEMORY = ROOT / ".codebase" / "facts.json"
"""Beside the sources that it is about, whatever the store: the first look at them takes seconds."""

_present: list[SourceTree] = []
_present_lock = threading.Lock()


def current() -> SourceTree:
    """Return this process's reading of the project, taken when it is first asked for."""
    with _present_lock:
        if not _present:
            _present.append(SourceTree(memory=MEMORY))
        return _present[0]


def replace_current(tree: SourceTree | None) -> None:
    """Put another reading in the place of this process's, or none, so that the next question takes a new one.

    For tests: a process that makes artifacts reads its sources once.
    """
    with _present_lock:
        _present[:] = [] if tree is None else [tree]
