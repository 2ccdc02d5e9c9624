"""What a profile says, on a page with its plots.

::

    payload/
      perf.md                  parts of a step and kinds of layers as tables
      parts.png  kinds.png     the same drawn; kinds beside the least that the device could take
"""

import base64
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import DataError

PROFILE = "perf_profile"
SCHEMA = "vpmoe.profile/1"
REPORT_NAME = "profile.json"
ENVELOPED_NAME = "run.profile.json"
PLOTS = ("parts.png", "kinds.png")
_MOST_BARS = 16
_HEAD = ["kind of layer", "ms", "forward", "backward", "at the least", "times that"]


def read_profile(payload: Path) -> dict[str, Any]:
    """Return the report of a profile.

    Args:
        payload: Of the profile.

    Raises:
        DataError: It is of a format that is not known here.
    """
    content: dict[str, Any] = json.loads((payload / REPORT_NAME).read_bytes())
    if (found := content.get("schema_version")) != SCHEMA:
        raise DataError(f"{payload / REPORT_NAME}: schema_version = {found!r}; known is {SCHEMA!r}")
    return content


def write_pages(content: Mapping[str, Any], payload: Path) -> None:
    """Write tables and plots; the same report gives the same bytes.

    Args:
        content: The report.
        payload: Directory to fill.
    """
    (payload / "perf.md").write_text(markdown(content) + "\n", encoding="utf-8")
    _draw(_parts, payload / PLOTS[0])(content)
    _draw(_kinds, payload / PLOTS[1])(content)


def images(payload: Path) -> dict[str, str]:
    """Return the plots, by file name, as data URIs."""
    return {
        name: f"data:image/png;base64,{base64.b64encode((payload / name).read_bytes()).decode()}"
        for name in PLOTS
    }


def headline(content: Mapping[str, Any]) -> str:
    """Say in a sentence what was measured, and on what."""
    where = content["gpu_name"] or "a CPU, whose figures say nothing about a GPU"
    used = "" if content["mfu"] is None else f", {content['mfu']:.1%} of the card's FLOP/s"
    memory = content["reserved_mem_bytes"] or content["peak_mem_bytes"]
    return (
        f"{content['run_name']}: {content['num_layers']} layers, {content['transformer_impl']}, "
        f"{content['dtype']}, mock data, on {where}: {content['ms_per_step']['p50']:,.1f} ms a step, "
        f"{content['tokens_per_s']:,.0f} tokens/s{used}, {memory / 2**30:.2f} GiB"
    )


def markdown(content: Mapping[str, Any]) -> str:
    """Return the page as markdown, without plots."""
    whole = content["ms_per_step"]["mean"]
    lines = [headline(content), "", "| part of a step | ms | share |", "| --- | ---: | ---: |"]
    lines += [f"| {name} | {ms:,.2f} | {ms / whole:.1%} |" for name, ms in _ranked(content["parts_ms"])]
    lines += ["", "| " + " | ".join(_HEAD) + " |", "| --- |" + " ---: |" * (len(_HEAD) - 1)]
    lines += ["| " + " | ".join(_cells(row)) + " |" for row in content["layers"]["kinds"]]
    return "\n".join([*lines, "", _explained(content)])


def page(content: Mapping[str, Any], plots: Mapping[str, str], title: str) -> str:
    """Return the page as HTML, whole in itself.

    Args:
        content: The report.
        plots: Source of each image by its title.
        title: Of the page.
    """
    whole = content["ms_per_step"]["mean"]
    parts = [[name, f"{ms:,.2f}", f"{ms / whole:.1%}"] for name, ms in _ranked(content["parts_ms"])]
    kinds = [_cells(row) for row in content["layers"]["kinds"]]
    drawn = "".join(
        f'<figure><img src="{source}" alt="{html.escape(name)}"></figure>' for name, source in plots.items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>'
        "body{font:15px/1.5 system-ui,sans-serif;margin:2rem auto;max-width:60rem;padding:0 1rem}"
        "table{border-collapse:collapse;margin:1rem 0}td,th{padding:.2rem .7rem;border-bottom:1px solid #ddd}"
        "td{text-align:right;font-variant-numeric:tabular-nums}td:first-child,th:first-child{text-align:left}"
        f"img{{max-width:100%}}figure{{margin:1.5rem 0}}</style><h1>{html.escape(title)}</h1>"
        f"<p>{html.escape(headline(content))}.</p>{drawn}"
        f"{_html_table(['part of a step', 'ms', 'share'], parts)}{_html_table(_HEAD, kinds)}"
        f"<p>{html.escape(_explained(content))}</p></html>\n"
    )


def _ranked(times: Mapping[str, float]) -> list[tuple[str, float]]:
    return sorted(times.items(), key=lambda pair: (-pair[1], pair[0]))


def _cells(row: Mapping[str, Any]) -> list[str]:
    floor = row["floor_ms"]
    return [
        row["kind"],
        *(f"{row[name]:,.2f}" for name in ("ms", "forward_ms", "backward_ms")),
        "–" if floor is None else f"{floor:,.2f}",
        f"{row['ms'] / floor:,.1f}" if floor else "–",
    ]


def _explained(content: Mapping[str, Any]) -> str:
    layers, rates = content["layers"], content["rates"]
    return (
        f"Kinds of layers: time of {layers['time']}, of {layers['measured_on']}; the optimizer's is that of "
        f"the timed steps. At the least: arithmetic at {rates['product_flops_per_s'] / 1e12:,.2f} TFLOP/s or "
        f"memory at {rates['copy_bytes_per_s'] / 1e9:,.1f} GB/s, whichever takes longer, both measured in "
        f"this run. {content['steps_measured']} steps were timed after {content['warmup_steps']}."
    )


def _html_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    header = "".join(f"<th>{html.escape(cell)}</th>" for cell in head)
    body = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>" for row in rows
    )
    return f"<table><thead><tr>{header}</tr></thead><tbody>{body}</tbody></table>"


def _draw(bars: Any, path: Path) -> Any:
    """Return what draws a figure of horizontal bars of a report into a file."""
    from matplotlib.figure import Figure

    def drawn(content: Mapping[str, Any]) -> None:
        figure = Figure(figsize=(7.6, 4.6), dpi=100, layout="constrained")
        axes = figure.add_subplot()
        bars(axes, content)
        axes.set_xlabel("ms")
        axes.invert_yaxis()
        axes.grid(axis="x", alpha=0.3)
        axes.tick_params(labelsize=8)
        # Without the name of the drawing program the same numbers give the same file.
        figure.savefig(path, metadata={"Software": None})

    return drawn


def _parts(axes: Any, content: Mapping[str, Any]) -> None:
    ranked = [pair for pair in _ranked(content["parts_ms"]) if pair[1] > 0][:_MOST_BARS]
    axes.barh([name for name, _ in ranked], [ms for _, ms in ranked])
    axes.set_title(f"parts of a step of {content['ms_per_step']['mean']:,.1f} ms", fontsize=9)


def _kinds(axes: Any, content: Mapping[str, Any]) -> None:
    rows = content["layers"]["kinds"][:_MOST_BARS]
    names = [row["kind"] for row in rows]
    forward = [row["forward_ms"] for row in rows]
    axes.barh(names, forward, label="forward, or all of it")
    axes.barh(names, [row["backward_ms"] for row in rows], left=forward, label="backward")
    known = [(place, row["floor_ms"]) for place, row in enumerate(rows) if row["floor_ms"] is not None]
    axes.plot(
        [floor for _, floor in known],
        [place for place, _ in known],
        "|",
        color="black",
        markersize=12,
        markeredgewidth=2,
        label="at the least",
    )
    axes.legend(fontsize=8)
