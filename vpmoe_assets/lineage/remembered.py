"""What present code and recipe make the assets of an experiment with, remembered on disk.

Finding it out takes the loading of the code location, Dagster and all: a second or two. It follows from the
sources, the experiment's file and the installed packages that decide bytes, and is remembered by the digest
of those. A step that asks for a folder outside is never remembered: what lies there may change at any time.
"""

import contextlib
import hashlib
import json
import logging
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.canonical import sha256_json
from trainer.contract.files import replace_text
from trainer.contract.json_text import parse_json
from vpmoe_assets.codebase.closure import Closure
from vpmoe_assets.codebase.toolchain import DECIDERS, installed
from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.fingerprint import recipe_fingerprint
from vpmoe_assets.lineage.latest import Latest
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.staleness import PresentStep

_SCHEMA = "vpmoe.steps/1"
_MOST = 12
"""Experiments, or states of one, that are remembered."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class RememberedStep:
    """What makes an asset, as it was when the code location was last loaded.

    Attributes:
        asset: Bare name.
        recipe: Recipe and seed.
        closure: The code that decides its bytes.
        inputs: Names of the assets that it is made from.
        partial: Names of further ones, each used only if it was ever published.
    """

    asset: str
    recipe: Mapping[str, Any]
    closure: Closure
    inputs: tuple[str, ...]
    partial: tuple[str, ...]

    def fingerprint_of(self, digests: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """Return the recipe fingerprint, and its payload, with inputs of these digests, by name."""
        return recipe_fingerprint(self.recipe, self.closure, digests)


@dataclass(frozen=True)
class Present:
    """What makes the assets of an experiment now.

    Attributes:
        experiment: Its name.
        strict: Whether it has `strict_toolchain`.
        steps: By asset, in the order of the graph.
    """

    experiment: str
    strict: bool
    steps: Mapping[str, PresentStep]


@dataclass(frozen=True)
class RecordedStep:
    """What made a version, taken for what would make it now: where there is no experiment to ask.

    Attributes:
        record: Of the version.
    """

    record: Record

    @property
    def asset(self) -> str:
        """Bare name."""
        return self.record.asset

    @property
    def closure(self) -> Closure:
        """The code that decides its bytes, as recorded."""
        payload = self.record.fingerprint_payload
        return Closure((), payload.get("sources", {}), payload.get("packages", {}))

    @property
    def inputs(self) -> Sequence[str]:
        """Names of the assets that it was made from."""
        return tuple(reference.role for reference in self.record.inputs)

    @property
    def partial(self) -> Sequence[str]:
        """None: which inputs it could do without, a record does not say."""
        return ()

    def fingerprint_of(self, digests: Mapping[str, str]) -> tuple[str, dict[str, Any]]:
        """Return the fingerprint, and its payload, with inputs of these digests, by name."""
        own = self.record.fingerprint_payload
        payload = {**own, "inputs": {**own.get("inputs", {}), **digests}}
        return sha256_json(payload), payload


def recorded_steps(latest: Latest) -> dict[str, RecordedStep]:
    """Return what made the latest version of each asset: code and recipe count as unchanged then."""
    found: dict[str, RecordedStep] = {}
    for asset in latest.assets:
        if heads := latest.versions(asset)[0]:
            with contextlib.suppress(RecordError, FileNotFoundError):  # removed, or altered, meanwhile
                found[asset] = RecordedStep(latest.record(heads[-1]))
    return found


def present_key(tree: SourceTree, experiment: str) -> str:
    """Return the digest of all that the steps of an experiment follow from.

    Args:
        tree: The sources.
        experiment: A name, or the path of its TOML file.
    """
    given = Path(experiment)
    file = given.read_bytes() if experiment.endswith(".toml") and given.is_file() else b""
    return sha256_json(
        {
            "schema": _SCHEMA,
            "experiment": experiment,
            "file": hashlib.sha256(file).hexdigest(),
            "sources": {path: hashlib.sha256(content).hexdigest() for path, content in tree.content.items()},
            "packages": {name: installed(name) for name in DECIDERS},
            "python": list(sys.version_info[:3]),
        }
    )


class StepMemory:
    """Steps by the digest of what they follow from. A shortcut: what cannot be read is found out again.

    Args:
        path: File on disk.
    """

    def __init__(self, path: Path) -> None:
        self._path = path

    def recall(self, key: str) -> Present | None:
        """Return what is remembered under a key, or None."""
        entry = self._stored().get(key)
        try:
            return None if entry is None else _present(entry)
        except (KeyError, TypeError, AttributeError) as error:
            _log.debug("what makes the assets is found out again: %r", error)
            return None

    def keep(self, key: str, present: Present) -> None:
        """Remember steps under a key; what cannot be written, or has no store yet, is found out again."""
        if not self._path.parent.parent.is_dir():
            return
        others = {other: entry for other, entry in self._stored().items() if other != key}
        kept = dict(list(others.items())[-(_MOST - 1) :]) | {key: _entry(present)}
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            replace_text(self._path, json.dumps(kept, separators=(",", ":")), durable=False)
        except OSError as error:
            _log.debug("what makes the assets is not kept: %s", error)

    def _stored(self) -> dict[str, Any]:
        try:
            found = parse_json(self._path.read_bytes())
        except (OSError, ValueError):
            return {}
        return found if isinstance(found, dict) else {}


def _entry(present: Present) -> dict[str, Any]:
    files: dict[str, str] = {}
    steps = [step for step in present.steps.values() if isinstance(step, RememberedStep)]
    for step in steps:
        files |= step.closure.sources
    places = {path: place for place, path in enumerate(files)}
    return {
        "experiment": present.experiment,
        "strict": present.strict,
        "files": list(files.items()),
        "steps": [
            {
                "asset": step.asset,
                "recipe": step.recipe,
                "roots": list(step.closure.roots),
                "sources": [places[path] for path in step.closure.sources],
                "packages": dict(step.closure.packages),
                "inputs": list(step.inputs),
                "partial": list(step.partial),
            }
            for step in steps
        ],
    }


def _present(entry: Mapping[str, Any]) -> Present:
    files = entry["files"]
    steps = {
        step["asset"]: RememberedStep(
            step["asset"],
            step["recipe"],
            Closure(tuple(step["roots"]), dict(files[place] for place in step["sources"]), step["packages"]),
            tuple(step["inputs"]),
            tuple(step["partial"]),
        )
        for step in entry["steps"]
    }
    return Present(entry["experiment"], entry["strict"], steps)
