"""Plots as markdown images, small enough for the event log.

One costs a tenth of a second or more, and an artifact that is reused shows the same one again: `drawn_once`
keeps it in the store's `.work/plots`, which may be deleted at any time.
"""

import base64
import hashlib
import io
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_text
from vpmoe_assets.build import Published


def drawn_once(item: Published, name: str, draw: Callable[[], str | None]) -> str | None:
    """Return a plot of an artifact as drawn before by the present code, or draw it.

    Args:
        item: The artifact; what is drawn follows from its record and files alone.
        name: Of the plot, among those of the artifact.
        draw: Returns the markdown, or None where there is nothing to see.
    """
    folder = item.directory.parents[2] / ".work" / "plots"
    kept = folder / f"{item.record.record_digest}-{name}-{_code()}.md"
    try:
        text = kept.read_text(encoding="ascii")
    except FileNotFoundError:
        text = draw() or ""
        folder.mkdir(parents=True, exist_ok=True)
        replace_text(kept, text, durable=False)
    return text or None


def loss_curve(
    points: Sequence[Mapping[str, Any]], held_out: str = "the same, held out", most: int = 2000
) -> str:
    """Return a markdown image of the training objective, the same on held-out data, and the loss per token.

    Args:
        points: Lines of `metrics.jsonl`, with `step`, `loss` and sometimes `heldout_objective` and
            `heldout_loss`.
        held_out: What the objective on held-out data is called.
        most: Points drawn at most, evenly chosen.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(6.4, 3.2), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    for key, label, style in (
        ("loss", "training objective", "-"),
        ("heldout_objective", held_out, "o--"),
        ("heldout_loss", "held out, per token", "s:"),
    ):
        series = [(point["step"], point[key]) for point in points if key in point]
        series = series[:: max(1, len(series) // most)]
        if series:
            axes.plot(*zip(*series, strict=True), style, label=label, linewidth=1.3, markersize=4)
    axes.set_xlabel("step")
    axes.set_ylabel("nats")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.grid(alpha=0.3)
    axes.legend(loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3, fontsize=8, frameon=False)
    return _image(figure, "loss over steps")


def layer_profile(rows: Sequence[Mapping[str, Any]], most: int = 6) -> str | None:
    """Return a markdown image of what a conversion measured layer by layer, one panel for each quantity.

    Args:
        rows: The conversion's table: `layer` and numbers, None where a layer has no such number.
        most: Panels at most, in the order of the columns.

    Returns:
        None where no column varies over layers.
    """
    from matplotlib.figure import Figure

    series = {}
    for column in rows[0] if rows and "layer" in rows[0] else ():
        points = [(row["layer"], row[column]) for row in rows if _is_number(row[column])]
        if column not in ("layer", "parent_layer") and len({value for _, value in points}) > 1:
            series[column] = points
    chosen = list(series.items())[:most]
    if not chosen:
        return None
    figure = Figure(figsize=(6.4, 1.6 * len(chosen) + 0.4), dpi=90, layout="constrained")
    panels = figure.subplots(len(chosen), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (column, points) in zip(panels, chosen, strict=True):
        axes.plot(*zip(*points, strict=True), "o-", linewidth=1.2, markersize=3)
        axes.set_ylabel(column.replace("_", "\n", 1).replace("_", " "), fontsize=8)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("layer")
    return _image(figure, "measured layer by layer")


def panels(
    points: Sequence[Mapping[str, Any]], shown: Mapping[str, Mapping[str, str]], most: int = 2000
) -> str | None:
    """Return a markdown image of what a run logged beside its loss, one panel for each quantity.

    Args:
        points: Lines of `metrics.jsonl`, with `step`.
        shown: Label of the line by key of the metric, by what the panel's axis says. A panel of which nothing
            was logged is left out.
        most: Points of a line drawn at most, evenly chosen.

    Returns:
        None where nothing was logged.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    drawn: list[tuple[str, list[tuple[str, list[tuple[int, float]]]]]] = []
    for axis, lines in shown.items():
        series = []
        for key, label in lines.items():
            found = [(point["step"], point[key]) for point in points if _is_number(point.get(key))]
            if found:
                series.append((label, found[:: max(1, len(found) // most)]))
        if series:
            drawn.append((axis, series))
    if not drawn:
        return None
    figure = Figure(figsize=(6.4, 1.6 * len(drawn) + 0.4), dpi=90, layout="constrained")
    for axes, (axis, series) in zip(
        figure.subplots(len(drawn), 1, sharex=True, squeeze=False)[:, 0], drawn, strict=True
    ):
        for label, found in series:
            axes.plot(*zip(*found, strict=True), "o-", label=label, linewidth=1.2, markersize=3)
        axes.set_ylabel(axis, fontsize=8)
        axes.grid(alpha=0.3)
        if len(series) > 1:
            axes.legend(fontsize=7)
        if axis == drawn[-1][0]:
            axes.set_xlabel("step")
            axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return _image(figure, "measured over steps")


def bars(counts: Mapping[str, float], axis: str, height: str, title: str) -> str | None:
    """Return a markdown image of counts or shares as bars; None where there are none.

    Args:
        counts: Height of each bar by what stands below it, in order.
        axis: What the bars are of.
        height: What they count.
        title: Of the image, for those who cannot see it.
    """
    from matplotlib.figure import Figure

    if not counts:
        return None
    figure = Figure(figsize=(6.4, 2.4), dpi=90, layout="constrained")
    axes = figure.add_subplot()
    axes.bar(list(counts), list(counts.values()))
    axes.set_xlabel(axis)
    axes.set_ylabel(height)
    axes.tick_params(axis="x", labelsize=7)
    axes.grid(axis="y", alpha=0.3)
    return _image(figure, title)


@cache
def _code() -> str:
    """Return what tells plots of this code from those of another."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _image(figure: Any, title: str) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return f"![{title}](data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()})"
