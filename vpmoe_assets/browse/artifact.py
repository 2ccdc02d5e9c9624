"""What the page of one artifact says: facts, numbers, plots, the ladder, what it is judged by."""

import contextlib
import dataclasses
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import orjson
from markupsafe import Markup

from trainer.contract.status import METRICS_NAME
from vpmoe_assets.browse.charts import Line, line_chart, number
from vpmoe_assets.browse.panels import layer_charts, training_charts
from vpmoe_assets.codebase.toolchain import toolchain_difference, toolchain_note
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.record import Record
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.store import Store
from vpmoe_assets.units import human_bytes, human_duration

FIRST = (
    "valid_loss", "loss", "core8/centered_mean", "parameters", "active_parameters", "num_layers",
    "hidden_size", "tokens", "rows", "train_tokens", "valid_tokens", "checkpoints", "resume_drift",
    "harmony/valid_rate",
)  # fmt: skip
"""Numbers that stand first, where there are any."""
_MOST_BYTES = 64_000_000
"""Of a file that is read for a plot."""
LADDER = "ladder.json"
_NLL = {"ppl/text/nll": "text", "ppl/reasoning/nll": "reasoning", "ppl/final/nll": "final"}
_RATES = {"harmony/valid_rate": "valid Harmony format", "numeric/characters": "characters of numbers copied"}


def numbers(record: Record) -> list[tuple[str, str]]:
    """Return the numbers of an artifact for people, those that are looked for first."""
    shown = {name: value for name, value in record.metrics.items() if value is not None}
    order = [name for name in FIRST if name in shown]
    if not record.evals:  # scores have a table of their own
        order += sorted(shown.keys() - set(order))
    return [(name, _in_bytes(name, shown[name]) or said(shown[name])) for name in order]


def cards(record: Record) -> int:
    """Return how many of the numbers stand first: those that are looked for, or the first few."""
    return sum(record.metrics.get(name) is not None for name in FIRST) or 6


def said(value: object) -> str:
    """Return a value for people."""
    return number(value) if isinstance(value, bool | int | float) else str(value)


def took(named: Record | Head) -> str:
    """Return how long it took to make an artifact, such as `2 min 5 s`."""
    started, finished = map(datetime.fromisoformat, (named.started_utc, named.finished_utc))
    return human_duration((finished - started).total_seconds())


def facts(record: Record) -> list[tuple[str, str]]:
    """Return how an artifact was made, name and value."""
    code, environment = record.code, record.environment
    packages: Mapping[str, Any] = environment.get("packages") or {}
    machine = [
        str(environment.get("host") or ""),
        ", ".join(map(str, environment.get("gpus") or ())) or str(environment.get("cpu") or ""),
    ]
    told = {
        "ran": f"{record.started_utc[:19].replace('T', ' ')}, "
        + took(record),
        "starts": "" if len(record.attempts) < 2 else f"{len(record.attempts)}, the last one delivered",
        "code": code.git_sha[:12] + (" with uncommitted changes" if code.git_dirty else ""),
        "execution": ", ".join(
            f"{key} {_plain(value)}"
            for key, value in sorted(record.execution.items())
            if value not in (None, [], False) and not isinstance(value, Mapping)
        ),
        "seed": "" if record.seed is None else str(record.seed),
        "machine": ", ".join(filter(None, machine)),
        "packages": ", ".join(
            f"{name} {release}"
            for name, release in [("python", environment.get("python")), *packages.items()]
            if name in ("python", "torch", "megatron-core") and release
        ),
        "toolchain": toolchain_note(toolchain_difference(environment)),
        "command": " ".join(record.command),
        "Dagster run": record.dagster_run_id or "",
        "files of": "" if record.original is None else
        f"{record.original.experiment}/{record.original.asset}@{record.original.version}",
    }  # fmt: skip
    return [(name, value) for name, value in told.items() if value]


def charts(record: Record, directory: Path) -> list[Markup]:
    """Return the plots of an artifact: of its training run, or of a conversion layer by layer."""
    drawn = training_charts(lines_of(directory / "run" / METRICS_NAME))
    layers = record.details.get("layers")
    if isinstance(layers, Sequence) and layers and all(isinstance(row, Mapping) for row in layers):
        drawn += layer_charts(layers)
    return drawn


def lines_of(metrics: Path) -> list[dict[str, Any]]:
    """Return the points of a run: none where the file was cleaned away, of one cut short what can be read."""
    points: list[dict[str, Any]] = []
    with contextlib.suppress(OSError):
        if metrics.stat().st_size <= _MOST_BYTES:
            for line in metrics.read_bytes().splitlines():
                with contextlib.suppress(orjson.JSONDecodeError):
                    point = orjson.loads(line)
                    if isinstance(point, dict):
                        points.append(point)
    return points


def ladder_of(payload: Path) -> "Ladder | None":
    """Return the ladder's page where an artifact is one; None where it is not, or cannot be read."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        content = orjson.loads((payload / LADDER).read_bytes())
        return Ladder(list(content["checkpoints"]))
    return None


@dataclasses.dataclass(frozen=True)
class Ladder:
    """The ladder: what each checkpoint scores.

    Attributes:
        rungs: As `ladder.json` has them, from the donor on.
    """

    rungs: Sequence[Mapping[str, Any]]

    @property
    def rows(self) -> list[dict[str, Any]]:
        """The table, a dict for each checkpoint."""
        return [_row(rung) for rung in self.rungs]

    def charts(self) -> list[Markup]:
        """Return the plots of the ladder."""
        names = [str(rung["checkpoint"]) for rung in self.rungs]
        core8 = Line(
            "mean of eight", [(i, r["core8"]) for i, r in enumerate(self.rungs) if r["core8"] is not None]
        )
        drawn = [
            line_chart([core8], title="CORE-8: centred accuracy (0 is chance)", x=names),
            line_chart(self._lines(_NLL), title="Held-out loss, nats per token", x=names),
            line_chart(self._lines(_RATES), title="Rates", x=names),
        ]
        return [chart for chart in drawn if chart]

    def _lines(self, keys: Mapping[str, str]) -> list[Line]:
        return [
            Line(label, [(i, r["metrics"][key]) for i, r in enumerate(self.rungs) if key in r["metrics"]])
            for key, label in keys.items()
        ]


def judged(store: Store, record: Record, remarks: Remarks) -> dict[str, Any]:
    """Return checks, statements and remarks about an artifact, for its page."""
    statements = store.statements.about(record)
    return {
        "checks": store.findings(record),
        "statements": [
            {
                "time": each.time[:19].replace("T", " "),
                "kind": each.kind,
                "author": each.author,
                "what": each.reason or str(each.body.get("check") or each.body.get("by") or ""),
                "outcome": str(each.body.get("outcome") or ""),
                "id": each.id,
            }
            for each in reversed(statements)
        ],
        "remarks": remarks.about(record),
    }


def _row(rung: Mapping[str, Any]) -> dict[str, Any]:
    metrics = rung["metrics"]
    delta = rung["delta"] or {}
    error = rung["core8_stderr"]
    return {
        "checkpoint": rung["checkpoint"],
        "layers": rung["layers"],
        "parameters": rung["parameters"],
        "tokens": rung["tokens"],
        "core8": None if rung["core8"] is None else _signed(rung["core8"]),
        "error": None if error is None else f"± {error:.3f}",
        "delta": None if (change := delta.get("core8_centered_mean")) is None else _signed(change),
        "nll": [None if (nll := metrics.get(key)) is None else f"{nll:.3f}" for key in _NLL],
        "valid": None if (rate := metrics.get("harmony/valid_rate")) is None else f"{rate:.0%}",
    }


def _signed(value: float) -> str:
    return f"{value:+z.3f}".replace("+0.000", "0.000")


def _in_bytes(name: str, value: object) -> str | None:
    return human_bytes(value) if name.endswith("bytes") and isinstance(value, int) else None


def _plain(value: object) -> str:
    if value is True:
        return "yes"
    return " ".join(map(str, value)) if isinstance(value, list | tuple) else str(value)
