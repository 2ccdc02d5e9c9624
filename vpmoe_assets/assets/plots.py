"""Plots as markdown images, small enough for the event log."""

import base64
import io
from collections.abc import Sequence
from typing import Any


def loss_curve(points: Sequence[dict[str, Any]], most: int = 2000) -> str:
    """Return a markdown image of training and held-out loss over steps.

    Args:
        points: lines of ``metrics.jsonl``, with ``step``, ``loss`` and sometimes ``heldout_loss``.
        most: points drawn at most, evenly chosen.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (("loss", "training", "-"), ("heldout_loss", "held out", "o--")):
        series = [(point["step"], point[key]) for point in points if key in point]
        series = series[:: max(1, len(series) // most)]
        if series:
            axes.plot(*zip(*series, strict=True), style, label=label, linewidth=1.3, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.3)
    axes.legend()
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"![loss over steps](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
