"""The whole ladder on one page: what each checkpoint scores, what it lost and won back, what it cost.

::

    payload/
      ladder.json     the numbers, one object a checkpoint
      ladder.md       the same as a table
      core8.png  nll.png  checks.png      each where something of it was measured
"""

import base64
import html
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vpmoe_assets.lineage.record import Record

SCHEMA = "vpmoe.ladder_report/1"
NLL_PARTS = ("text", "reasoning", "final")
RATES = {
    "harmony/valid_rate": "valid Harmony format",
    "numeric/characters": "characters of numbers copied",
}


@dataclass(frozen=True)
class Rung:
    """One checkpoint and its report.

    Attributes:
        name: Asset of the checkpoint.
        report: Content of its evaluation report.
        parameters: Of the checkpoint; None where its record does not say.
        layers: Likewise.
        tokens: Spent on training this very step, 0 for a conversion.
        delta: What changed since the checkpoint before; None where that was not evaluated.
        link: Where its record is, relative to the page; None without one.
    """

    name: str
    report: Mapping[str, Any]
    parameters: int | None
    layers: int | None
    tokens: int
    delta: Mapping[str, Any] | None = None
    link: str | None = None

    @classmethod
    def of(
        cls,
        name: str,
        report: Mapping[str, Any],
        record: "Record | None",
        delta: Mapping[str, Any] | None = None,
        link: str | None = None,
    ) -> "Rung":
        """Return a rung by the record of its checkpoint; None for one that is no longer in the store."""
        metrics = {} if record is None else record.metrics
        spent = {} if record is None else record.details.get("tokens", {})
        return cls(
            name=name,
            report=report,
            parameters=_whole(metrics.get("parameters")),
            layers=_whole(metrics.get("num_layers")),
            tokens=int(spent.get("total", 0)),
            delta=delta,
            link=link,
        )

    @property
    def metrics(self) -> Mapping[str, float]:
        """Flat metrics of the report."""
        metrics: Mapping[str, float] = self.report["metrics"]
        return metrics

    def row(self) -> dict[str, Any]:
        """Everything about it that the page shows, without the link."""
        return {
            "checkpoint": self.name,
            "parameters": self.parameters,
            "layers": self.layers,
            "tokens": self.tokens,
            "core8": self.report.get("core8_centered_mean"),
            "core8_stderr": self.metrics.get("core8/centered_mean_stderr"),
            "delta": self.delta,
            "metrics": dict(self.metrics),
            "refused": dict(self.report["refused"]),
        }


def _whole(value: Any) -> int | None:
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def write_ladder(rungs: Sequence[Rung], payload: Path) -> list[str]:
    """Write the page's files; equal rungs give equal bytes, wherever their records are.

    Args:
        rungs: In the order of the ladder, at least one.
        payload: Directory to fill.

    Returns:
        Names of the plots.

    Raises:
        ValueError: No rung was given.
    """
    if not rungs:
        raise ValueError("no checkpoint has been evaluated yet, so there is no ladder to draw")
    content = {"schema": SCHEMA, "checkpoints": [rung.row() for rung in rungs]}
    (payload / "ladder.json").write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", "utf-8")
    (payload / "ladder.md").write_text(markdown(rungs, links=False) + "\n", "utf-8")
    plots = {"core8.png": _core8, "nll.png": _nll, "checks.png": _rates}
    return [name for name, draw in plots.items() if _saved(draw, rungs, payload / name)]


def images(payload: Path) -> dict[str, str]:
    """Return the plots that were drawn, by file name, as data URIs."""
    return {
        name: f"data:image/png;base64,{base64.b64encode((payload / name).read_bytes()).decode()}"
        for name in ("core8.png", "nll.png", "checks.png")
        if (payload / name).is_file()
    }


def markdown(rungs: Sequence[Rung], *, links: bool) -> str:
    """Return the ladder as a markdown table; with links, each checkpoint leads to its record."""
    head = ["checkpoint", "layers", "parameters", "tokens", "CORE-8", "Δ", *NLL_PARTS, "Harmony"]
    lines = ["| " + " | ".join(head) + " |", "| --- |" + " ---: |" * (len(head) - 1)]
    for rung in rungs:
        name = f"[{rung.name}]({rung.link})" if links and rung.link else rung.name
        lines.append("| " + " | ".join([name, *_cells(rung)]) + " |")
    return "\n".join(lines)


def page(rungs: Sequence[Rung], plots: Mapping[str, str], title: str) -> str:
    """Return the ladder as one HTML page.

    Args:
        rungs: In the order of the ladder.
        plots: Source of each image by its title.
        title: Of the page.
    """
    head = ["checkpoint", "layers", "parameters", "tokens", "CORE-8", "Δ", *NLL_PARTS, "Harmony"]
    rows = []
    for rung in rungs:
        name = html.escape(rung.name)
        first = f'<a href="{html.escape(rung.link)}">{name}</a>' if rung.link else name
        cells = "".join(f"<td>{html.escape(cell)}</td>" for cell in _cells(rung))
        rows.append(f"<tr><th>{first}</th>{cells}</tr>")
    images = "".join(
        f'<figure><img src="{source}" alt="{html.escape(name)}"></figure>' for name, source in plots.items()
    )
    header = "".join(f"<th>{html.escape(name)}</th>" for name in head)
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:70rem;padding:0 1rem}"
        "table{border-collapse:collapse}td,th{padding:.25rem .7rem;border-bottom:1px solid #ddd}"
        "td{text-align:right;font-variant-numeric:tabular-nums}tbody th{text-align:left;font-weight:500}"
        "img{max-width:100%}figure{margin:1.5rem 0}</style>"
        f"<h1>{html.escape(title)}</h1><p>CORE-8 is the mean of eight centred accuracies with its standard "
        "error, and Δ what it is against the checkpoint before. NLL is in nats per token and comparable "
        "between equal tokenizers only.</p>"
        f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(rows)}</tbody></table>{images}</html>\n"
    )


def _cells(rung: Rung) -> list[str]:
    core8, error = rung.report.get("core8_centered_mean"), rung.metrics.get("core8/centered_mean_stderr")
    delta = (rung.delta or {}).get("core8_centered_mean")
    return [
        _number(rung.layers),
        _number(rung.parameters),
        _number(rung.tokens),
        "–" if core8 is None else f"{core8:+.3f} ± {error or 0:.3f}",
        "–" if delta is None else f"{delta:+.3f}",
        *(
            "–" if (nll := rung.metrics.get(f"ppl/{part}/nll")) is None else f"{nll:.3f}"
            for part in NLL_PARTS
        ),
        "–" if (rate := rung.metrics.get("harmony/valid_rate")) is None else f"{rate:.0%}",
    ]


def _number(value: int | None) -> str:
    return "–" if value is None else f"{value:,}"


def _saved(draw: Callable[[Any, Sequence[Rung]], bool], rungs: Sequence[Rung], path: Path) -> bool:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(1.2 + 0.8 * max(4, len(rungs)), 4.2), dpi=110, layout="constrained")
    axes = figure.add_subplot()
    if not draw(axes, rungs):
        return False
    axes.set_xticks(range(len(rungs)), [rung.name for rung in rungs], rotation=35, ha="right", fontsize=8)
    axes.grid(axis="y", alpha=0.3)
    axes.legend(fontsize=8, ncols=2)
    # Without the name of the drawing program the same numbers give the same file.
    figure.savefig(path, metadata={"Software": None})
    return True


def _series(rungs: Sequence[Rung], name: str) -> tuple[list[int], list[float]]:
    places = [place for place, rung in enumerate(rungs) if name in rung.metrics]
    return places, [rungs[place].metrics[name] for place in places]


def _core8(axes: Any, rungs: Sequence[Rung]) -> bool:
    tasks = sorted(
        {name.split("/")[1] for rung in rungs for name in rung.metrics if name.endswith("/centered")}
    )
    for task in tasks:
        places, values = _series(rungs, f"core8/{task}/centered")
        axes.plot(places, values, ".-", alpha=0.45, linewidth=1, label=task)
    places, values = _series(rungs, "core8/centered_mean")
    if not places:
        return False
    _, errors = _series(rungs, "core8/centered_mean_stderr")
    axes.errorbar(places, values, yerr=errors, fmt="o-", color="black", capsize=3, label="mean ± s.e.")
    axes.axhline(0, color="gray", linewidth=0.8, linestyle=":")
    axes.set_ylabel("centred accuracy (0 = chance)")
    return True


def _nll(axes: Any, rungs: Sequence[Rung]) -> bool:
    drawn = False
    for part in NLL_PARTS:
        places, values = _series(rungs, f"ppl/{part}/nll")
        if places:
            _, errors = _series(rungs, f"ppl/{part}/stderr")
            axes.errorbar(
                places,
                values,
                yerr=errors if len(errors) == len(values) else None,
                fmt="o-",
                capsize=3,
                label=part,
            )
            drawn = True
    axes.set_ylabel("held-out loss (nats per token)")
    return drawn


def _rates(axes: Any, rungs: Sequence[Rung]) -> bool:
    drawn = False
    for name, label in RATES.items():
        places, values = _series(rungs, name)
        if places:
            axes.plot(places, values, "o-", label=label)
            drawn = True
    axes.set_ylim(-0.03, 1.03)
    axes.set_ylabel("rate")
    return drawn
