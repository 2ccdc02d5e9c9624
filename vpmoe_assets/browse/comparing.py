"""Two artifacts side by side: what was done otherwise, and what came of it."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from trainer.contract.status import METRICS_NAME
from vpmoe_assets.browse.artifact import lines_of, said
from vpmoe_assets.browse.charts import Line, line_chart
from vpmoe_assets.lineage.difference import Change, Difference, changes, recipe_changes
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.store import Store

_CURVES = {"loss": "Loss, nats", "heldout_loss": "Held-out loss, nats per token"}


@dataclass(frozen=True)
class Section:
    """One kind of difference.

    Attributes:
        title: What it is about.
        rows: Name, value of the first, value of the second; None where it is not there.
    """

    title: str
    rows: tuple[tuple[str, str | None, str | None], ...]


def sections(old: Record, new: Record) -> list[Section]:
    """Return what differs between two artifacts, what decides bytes first; equal sections are left out."""
    return [section for section in _sections(old, new) if section.rows]


def overlaid(store: Store, old: Record, new: Record) -> list[Markup]:
    """Return the curves of two training runs over each other; none where one has none."""
    points = [lines_of(store.directory(each) / "run" / METRICS_NAME) for each in (old, new)]
    if not all(points):
        return []
    drawn = []
    for key, title in _CURVES.items():
        lines = [
            Line(f"{name}: {each.version}", [(p["step"], p[key]) for p in run if key in p and "step" in p])
            for name, each, run in zip("AB", (old, new), points, strict=True)
        ]
        drawn.append(line_chart(lines, title=title))
    return [chart for chart in drawn if chart]


def _sections(old: Record, new: Record) -> Iterator[Section]:
    found = Difference.between(old.fingerprint_payload, new.fingerprint_payload)
    yield Section("Recipe", _rows(found.recipe))
    yield Section("Inputs", _rows(changes(_inputs(old), _inputs(new))))
    yield Section("Code", _rows(found.sources, short=True))
    yield Section("Packages that decide bytes", _rows(found.packages))
    yield Section("Numbers", _numbers(old.metrics, new.metrics))
    yield Section("Execution", _rows(recipe_changes(old.execution, new.execution)))
    yield Section("Machine and packages", _rows(recipe_changes(_machine(old), _machine(new))))
    yield Section("Files", _rows(changes(_files(old), _files(new)), short=True))


def _rows(
    found: tuple[Change, ...], *, short: bool = False
) -> tuple[tuple[str, str | None, str | None], ...]:
    cut = (lambda text: text and text[:12]) if short else (lambda text: text)
    return tuple((change.name, cut(change.old), cut(change.new)) for change in found)


def _numbers(
    old: Mapping[str, Any], new: Mapping[str, Any]
) -> tuple[tuple[str, str | None, str | None], ...]:
    rows = []
    for name in sorted(old.keys() | new.keys()):
        before, after = old.get(name), new.get(name)
        if before != after:
            text = None if after is None else said(after)
            if isinstance(before, int | float) and isinstance(after, int | float):
                text = f"{said(after)} ({after - before:+.3g})"
            rows.append((name, None if before is None else said(before), text))
    return tuple(rows)


def _inputs(record: Record) -> dict[str, str]:
    return {each.role: f"{each.asset}@{each.version} {each.digest[:12]}" for each in record.inputs}


def _files(record: Record) -> dict[str, str]:
    return {entry.path: entry.sha256 for entry in record.files}


def _machine(record: Record) -> dict[str, Any]:
    return {key: value for key, value in record.environment.items() if key not in ("executable", "variables")}
