"""What the UI shows of a training run: its curves, and where its log is."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import dagster as dg
import orjson

from trainer.contract.status import LOG_NAME, METRICS_NAME
from vpmoe_assets.assets.plots import bars, drawn_once, loss_curve, panels
from vpmoe_assets.browse.panels import BY_SPAN, ROLLOUTS
from vpmoe_assets.build import Published
from vpmoe_assets.checks.distillation import staleness


def training_metadata(item: Published) -> Mapping[str, Any]:
    """Return the curves of a run as plots, and where its log is."""
    run = item.directory / "run"
    shown: dict[str, Any] = {"log": dg.MetadataValue.path(run / LOG_NAME)}
    metrics = run / METRICS_NAME
    if metrics.is_file():
        curve = drawn_once(item, "curve", lambda: _loss(_points(metrics)))
        shown["curve"] = dg.MetadataValue.md(curve or "")
    return shown


def distillation_metadata(item: Published) -> Mapping[str, Any]:
    """Return the same with what a run from a teacher logs beside its loss."""
    shown = dict(training_metadata(item))
    metrics = item.directory / "run" / METRICS_NAME
    if metrics.is_file():
        curves = drawn_once(item, "distillation", lambda: _distillation(_points(metrics)))
        ages = drawn_once(item, "staleness", lambda: _staleness(_points(metrics)))
        shown |= {
            name: dg.MetadataValue.md(plot)
            for name, plot in {"distillation": curves, "staleness": ages}.items()
            if plot is not None
        }
    return shown


def _loss(points: Sequence[Mapping[str, Any]]) -> str:
    if not any("rollouts/trained" in point for point in points):
        return loss_curve(points)
    # The objective of answers is the teacher's word on them; held-out conversations have none.
    return loss_curve(points, held_out="cross-entropy by span, held out")


def _distillation(points: Sequence[Mapping[str, Any]]) -> str | None:
    keys = {key for point in points for key in point}
    spans = {
        axis: {key: key.partition("/")[2] for key in sorted(keys) if key.partition("/")[0] == name}
        for name, axis in BY_SPAN.items()
    }
    return panels(points, {**spans, **ROLLOUTS})


def _staleness(points: Sequence[Mapping[str, Any]]) -> str | None:
    return bars(
        staleness(points), "steps between writing and training", "rollouts", "staleness of the rollouts"
    )


def _points(metrics: Path) -> list[dict[str, Any]]:
    with metrics.open("rb") as lines:
        return [orjson.loads(line) for line in lines]
