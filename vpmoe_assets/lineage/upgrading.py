"""Artifacts of the earlier schema: what can be shown of them, held against what would make them now.

Their fingerprints cover other things (files by their bytes, listed by hand; no packages), so they never equal
a present one. But a clean commit gives back the very sources, and their import closure can be computed today;
the recipe, the inputs and most releases of packages stand in the record. What cannot be shown is said.
Whether it is enough is for a person to state, as an acceptance.
"""

import hashlib
import io
import re
import tarfile
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.syntax import SourceError
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.acceptance import (
    EARLIER_RELEASES,
    Acceptance,
    Named,
    accepting,
    recorded_inputs,
)
from vpmoe_assets.lineage.difference import Change, Difference, changes, recipe_changes
from vpmoe_assets.lineage.errors import ProvenanceError
from vpmoe_assets.lineage.git import git
from vpmoe_assets.lineage.provenance import source_digest
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.statements import Statement
from vpmoe_assets.project import ROOT

_LOCK = "requirements.lock"
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)


@dataclass(frozen=True)
class Comparison:
    """What is known of an artifact of the earlier schema.

    Attributes:
        record: Of the artifact.
        fingerprint: That it would count for.
        payload: Of that fingerprint.
        shown: What is the same, and how that is known.
        unknown: What cannot be shown.
        difference: What is known to differ.
        unequal: Inputs that are not the present ones; with one it can never count.
    """

    record: Record
    fingerprint: str
    payload: Mapping[str, Any]
    shown: tuple[str, ...]
    unknown: tuple[str, ...]
    difference: Difference
    unequal: tuple[str, ...]

    @property
    def proven(self) -> bool:
        """Whether everything is shown to be the same."""
        return not (self.unknown or self.difference or self.unequal)

    def accepted(self, said: Sequence[Acceptance], *, reason: str, named: Named) -> Statement:
        """Return a person's statement that this is enough.

        Raises:
            StatementError: It is refused: an input is another, or a difference is not named.
        """
        return accepting(
            self.record,
            self.payload,
            said,
            reason=reason,
            shown_by={"commit": self.record.code.git_sha},
            difference=self.difference,
            named=named,
            unknown=self.unknown,
        )


class Commits:
    """Sources as commits of this project have them, read from git's objects; a context manager.

    Args:
        root: The checkout.
    """

    def __init__(self, root: Path = ROOT) -> None:
        self._root = root
        self._trees: dict[str, SourceTree | None] = {}
        self._stack = ExitStack()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stack.close()

    def tree(self, sha: str) -> SourceTree | None:
        """Return the sources of a commit, or None where it is not at hand."""
        if sha not in self._trees:
            self._trees[sha] = self._read(sha)
        return self._trees[sha]

    def _read(self, sha: str) -> SourceTree | None:
        try:
            archive = git(self._root, "archive", "--format=tar", sha)
        except ProvenanceError:
            return None
        directory = Path(self._stack.enter_context(tempfile.TemporaryDirectory(prefix="vpmoe-commit-")))
        with tarfile.open(fileobj=io.BytesIO(archive)) as packed:
            packed.extractall(directory, filter="data")
        return SourceTree(directory)


def compare(
    record: Record, fingerprint: str, payload: Mapping[str, Any], closure: Closure, commits: Commits
) -> Comparison:
    """Hold an artifact of the earlier schema against what would make it now.

    Args:
        record: Of the artifact.
        fingerprint: That it would have if it were made now.
        payload: Of that fingerprint.
        closure: Its code now.
        commits: Where the code that made it is looked for.
    """
    shown: list[str] = []
    unknown: list[str] = []
    tree = _tree(record, commits, shown, unknown)
    own = None if tree is None else _closure(tree, closure, record, unknown)
    sources: tuple[Change, ...] = ()
    if own is not None:
        sources = changes(own.sources, closure.sources)
        if not sources:
            shown.append(f"code: {len(own.sources)} files say what they said")
    recipe = recipe_changes(record.recipe, payload["recipe"])
    if not recipe:
        shown.append("recipe: every value is the same")
    packages = tuple(_packages(record, tree, own, closure, shown, unknown))
    own_inputs, inputs = recorded_inputs(record), dict(payload["inputs"])
    unequal = tuple(_unequal(own_inputs, inputs))
    if not unequal:
        shown.append("inputs: each has the same digest" if inputs else "inputs: it has none")
    difference = Difference(sources, recipe, packages)
    return Comparison(record, fingerprint, payload, tuple(shown), tuple(unknown), difference, unequal)


def _unequal(own: Mapping[str, str], now: Mapping[str, str]) -> Iterator[str]:
    for role in sorted(own.keys() | now.keys()):
        if role not in now:
            yield f"{role} is an input no more"
        elif role not in own:
            yield f"{role} is an input now"
        elif own[role] != now[role]:
            yield f"input {role} is another one now ({own[role][:8]} → {now[role][:8]})"


def _tree(record: Record, commits: Commits, shown: list[str], unknown: list[str]) -> SourceTree | None:
    """Return the sources that made an artifact, where it can be shown that they are those."""
    commit = record.code.git_sha
    if record.code.git_dirty:
        unknown.append(
            f"its code: the tree differed from commit {commit[:12]}, and only a hash of that was kept"
        )
        return None
    tree = commits.tree(commit)
    if tree is None:
        unknown.append(f"its code: commit {commit[:12]} is not in this repository; fetch it")
        return None
    if source_digest(tree.content) != record.code.source_digest:
        unknown.append(f"its code: the sources of commit {commit[:12]} are not those that were recorded")
        return None
    shown.append(f"commit {commit[:12]}: clean, at hand, with the sources that were recorded")
    return tree


def _closure(tree: SourceTree, now: Closure, record: Record, unknown: list[str]) -> Closure | None:
    there = [root for root in now.roots if root in tree.modules]
    if absent := sorted(set(now.roots) - set(there)):
        commit = record.code.git_sha[:12]
        unknown.append(f"its code: what makes it now is not in commit {commit}: {', '.join(absent)}")
        return None
    try:
        return tree.closure(there)
    except (LookupError, SourceError) as error:
        unknown.append(f"its code: {error}")
        return None


def _packages(
    record: Record,
    tree: SourceTree | None,
    own: Closure | None,
    now: Closure,
    shown: list[str],
    unknown: list[str],
) -> Iterator[Change]:
    """Yield the packages whose release differs; say of the others how theirs is known."""
    recorded = {
        name: release for name, release in (record.environment.get("packages") or {}).items() if release
    }
    inputs = record.fingerprint_payload.get("inputs", {})
    recorded |= {name: inputs[role] for role, name in EARLIER_RELEASES.items() if role in inputs}
    locked = _locked(record, tree, recorded)
    same: list[str] = []
    for name in sorted(now.packages.keys() | (own.packages.keys() if own is not None else set())):
        then = recorded.get(name) or locked.get(name)
        if own is not None and name not in own.packages:
            then = None  # its code did not use it
        elif then is None:
            unknown.append(
                f"package {name}: its release was not recorded; it is {now.packages.get(name)} now"
            )
            continue
        if then != now.packages.get(name):
            yield Change(name, then, now.packages.get(name))
        else:
            same.append(f"{name} {then}" + ("" if name in recorded else " (by its lock file)"))
    if same:
        shown.append(f"packages: {', '.join(same)}")


def _locked(record: Record, tree: SourceTree | None, recorded: Mapping[str, str]) -> dict[str, str]:
    """Return the releases that the commit's lock file pins, where they are those that were installed.

    That is believed where the record names this very file and every release that it has is the pinned one.
    """
    content = b"" if tree is None else tree.content.get(_LOCK, b"")
    if not content or hashlib.sha256(content).hexdigest() != record.environment.get("lock_digest"):
        return {}
    pins = {_normal(name): release for name, release in _PIN.findall(content.decode("utf-8"))}
    agree = all(pins.get(_normal(name), release) == release for name, release in recorded.items())
    return pins if agree else {}


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
