"""What came of making an artifact again: the same, or where it differs first."""

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.contract.json_text import parse_json
from vpmoe_assets.lineage.digest import FileEntry
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.rows import METRICS_FILE
from vpmoe_assets.lineage.tensor_change import TensorChange, tensor_change

_MEASURED = re.compile(r"(_ms|_s|seconds?|per_second|_share)$")
"""Metrics that a clock decides."""
_CHUNK = 1 << 20


@dataclass(frozen=True)
class FileChange:
    """The first file of a payload that differs.

    Attributes:
        path: In the payload.
        what: One line: where it differs.
        tensor: For weights, how the first tensor does.
        differing: How many files differ.
        files: How many there are.
    """

    path: str
    what: str
    tensor: TensorChange | None
    differing: int
    files: int

    def __str__(self) -> str:
        return f"{self.path}: {self.tensor or self.what} ({self.differing} of {self.files} files differ)"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        return {
            "path": self.path,
            "what": self.what,
            "tensor": self.tensor and self.tensor.to_dict(),
            "differing": self.differing,
            "files": self.files,
        }


@dataclass(frozen=True)
class StepChange:
    """The first step of a training whose metrics differ.

    Attributes:
        step: Its number.
        changes: `(metric, recorded, now)`, the loss first; None where one side has no such metric.
    """

    step: int
    changes: Sequence[tuple[str, Any, Any]]

    def __str__(self) -> str:
        name, old, new = self.changes[0]
        more = f" and {len(self.changes) - 1} more metrics" if len(self.changes) > 1 else ""
        return f"step {self.step}: {name} {old} → {new}{more}"

    def to_dict(self) -> dict[str, Any]:
        """Return the fields as plain values."""
        changes = [{"metric": name, "recorded": old, "now": new} for name, old, new in self.changes]
        return {"step": self.step, "changes": changes}


def first_file(old: Record, old_payload: Path, new: Record, new_payload: Path) -> FileChange | None:
    """Return how the payloads of two records differ first, by path; weights before what describes them.

    Args:
        old: As recorded.
        old_payload: Its directory; a file that is no longer there is named and not looked into.
        new: Made again.
        new_payload: Its directory.
    """
    before, after = _by_path(old), _by_path(new)
    wrong = [path for path in before.keys() | after.keys() if before.get(path) != after.get(path)]
    if not wrong:
        return None
    path = min(wrong, key=lambda each: (not each.endswith(".safetensors"), each))
    tensor = None
    if path not in after:
        what = "no longer made"
    elif path not in before:
        what = "not made before"
    elif not (old_payload / path).is_file():
        what = f"sha256 {after[path].sha256}, recorded {before[path].sha256}"
    else:
        if path.endswith(".safetensors"):
            tensor = tensor_change(old_payload / path, new_payload / path)
        what = _within(old_payload / path, new_payload / path)
    return FileChange(path, what, tensor, len(wrong), len(before.keys() | after.keys()))


def first_step(old_run: Path, new_run: Path) -> StepChange | None:
    """Return the first step whose metrics differ, of what trainings logged; None where none does.

    Metrics that a clock decides are left out, and so are lines without a step.
    """
    before, after = _steps(old_run / METRICS_FILE), _steps(new_run / METRICS_FILE)
    for step in sorted(before.keys() | after.keys()):
        old, new = before.get(step, {}), after.get(step, {})
        names = [name for name in {**old, **new} if not _MEASURED.search(name)]
        changes = [(name, old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)]
        if changes:
            return StepChange(step, sorted(changes, key=lambda each: (not _is_loss(each[0]), each[0])))
    return None


def _is_loss(metric: str) -> bool:
    return metric in ("loss", "heldout_loss")


def _by_path(record: Record) -> dict[str, FileEntry]:
    return {entry.path: entry for entry in record.files}


def _steps(path: Path) -> dict[int, dict[str, Any]]:
    """Return what was logged of each step; a step that was repeated counts as logged last."""
    found: dict[int, dict[str, Any]] = {}
    if not path.is_file():
        return found
    with path.open("rb") as lines:
        for line in lines:
            try:
                fields = parse_json(line)
            except ValueError:
                continue
            if isinstance(fields, dict) and isinstance(step := fields.pop("step", None), int):
                found.setdefault(step, {}).update(fields)
    return found


def _within(old: Path, new: Path) -> str:
    """Say where two files differ first: a key of JSON, else a byte."""
    if old.suffix == ".json":
        try:
            key, before, after = next(_keys(parse_json(old.read_bytes()), parse_json(new.read_bytes())))
        except (ValueError, StopIteration):
            pass
        else:
            return f"{key or 'the value'}: {_short(before)} → {_short(after)}"
    offset = 0
    with old.open("rb") as one, new.open("rb") as other:
        while True:
            left, right = one.read(_CHUNK), other.read(_CHUNK)
            if left != right or not left:
                break
            offset += len(left)
    offset += next(
        (i for i, (a, b) in enumerate(zip(left, right, strict=False)) if a != b), min(len(left), len(right))
    )
    sizes = f"{old.stat().st_size} → {new.stat().st_size} bytes, "
    return f"{sizes if old.stat().st_size != new.stat().st_size else ''}from byte {offset} on"


def _keys(old: Any, new: Any, place: str = "") -> Iterator[tuple[str, Any, Any]]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _keys(old.get(key), new.get(key), f"{place}.{key}" if place else key)
    elif isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        for position, (before, after) in enumerate(zip(old, new, strict=True)):
            yield from _keys(before, after, f"{place}[{position}]")
    elif old != new:
        yield place, old, new


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:59]}…"
