"""Line charts as SVG inside a page: no image, no script, the colours of the style sheet, light or dark."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from markupsafe import Markup, escape

WIDTH, HEIGHT = 640, 240
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 26, 38
_NAMES = 96
"""Below the axis where names stand on it."""
_MOST = 400
"""Points of a line that are drawn at most, evenly chosen."""
_MARKED = 40
"""Points up to which each has a dot, with its value for whoever points at it."""
_COLOURS = 6
_LARGEST, _SMALLEST = 1e100, 1e-100
"""Sizes between which numbers have a place of their own; larger ones are no measurement."""


@dataclass(frozen=True)
class Line:
    """One line of a chart: a label, and points by x."""

    label: str
    points: Sequence[tuple[float, float]]


def line_chart(
    lines: Sequence[Line], *, title: str, unit: str = "", x: str | Sequence[str] = "step"
) -> Markup:
    """Return lines over a common axis; nothing where there is no point.

    Args:
        lines: In the order of the legend.
        title: Above the chart.
        unit: Of the values.
        x: What the x axis counts, or the names that stand at 0, 1, 2 and so on.
    """
    drawn = [Line(line.label, _thin(_finite(line.points))) for line in lines]
    drawn = [line for line in drawn if line.points]
    if not drawn:
        return Markup("")
    names = None if isinstance(x, str) else x
    bottom = _BOTTOM if names is None else _NAMES
    height = HEIGHT + bottom - _BOTTOM
    every = [point for line in drawn for point in line.points]
    x_ticks = list(range(len(names))) if names is not None else _ticks([p[0] for p in every], 7, whole=True)
    y_ticks = _ticks([p[1] for p in every], 5)
    x_range = (-0.9, len(names) - 0.7) if names is not None else _range([p[0] for p in every])
    y_range = _range([*y_ticks, *(p[1] for p in every)])

    def at(point: tuple[float, float]) -> tuple[float, float]:
        across = (point[0] - x_range[0]) / (x_range[1] - x_range[0])
        up = (point[1] - y_range[0]) / (y_range[1] - y_range[0])
        return (
            round(_LEFT + across * (WIDTH - _LEFT - _RIGHT), 1),
            round(height - bottom - up * (height - bottom - _TOP), 1),
        )

    parts = [
        f'<svg class="chart" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="14">{escape(title)}</text>',
    ]
    for tick in y_ticks:
        _, y = at((x_range[0], tick))
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{WIDTH - _RIGHT}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 3.5}" text-anchor="end">{number(tick)}</text>')
    for tick in x_ticks:
        across, _ = at((tick, y_range[0]))
        low = height - bottom
        parts.append(f'<line class="grid" x1="{across}" x2="{across}" y1="{_TOP}" y2="{low}"/>')
        if names is None:
            parts.append(f'<text x="{across}" y="{low + 15}" text-anchor="middle">{number(tick)}</text>')
        else:
            turned = f'transform="translate({across} {low + 12}) rotate(-28)"'
            parts.append(f'<text {turned} text-anchor="end">{escape(names[int(tick)])}</text>')
    if names is None:
        parts.append(f'<text x="{WIDTH - _RIGHT}" y="{height - 6}" text-anchor="end">{escape(str(x))}</text>')
    if unit:
        parts.append(f'<text x="{_LEFT}" y="{height - 6}">{escape(unit)}</text>' if names is None else "")
    for place, line in enumerate(drawn):
        colour = f"s{place % _COLOURS}"
        path = " ".join(f"{a},{b}" for a, b in map(at, line.points))
        if len(line.points) > 1:
            parts.append(f'<polyline class="line {colour}" points="{path}"/>')
        if len(line.points) <= _MARKED:
            for point in line.points:
                a, b = at(point)
                where = escape(names[int(point[0])]) if names is not None else f"{x} {number(point[0])}"
                said = f"{escape(line.label)}, {where}: {number(point[1])}"
                parts.append(
                    f'<circle class="{colour}" cx="{a}" cy="{b}" r="3"><title>{said}</title></circle>'
                )
    parts.append("</svg>")
    return Markup("").join(
        (Markup('<figure class="plot">'), Markup("".join(parts)), _legend(drawn), Markup("</figure>"))
    )


def number(value: float) -> str:
    """Return a number as short as it can be read: 1,234 · 0.0012 · 1.2e-07."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if value == int(value) and abs(value) < 1e15:
        return f"{int(value):,}"
    if 1e-4 <= abs(value) < 1e6:
        return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
    return f"{value:.3g}"


def _legend(lines: Sequence[Line]) -> Markup:
    if len(lines) < 2:
        return Markup("")
    entries = Markup("").join(
        Markup('<span><i class="s{}"></i>{}</span>').format(place % _COLOURS, line.label)
        for place, line in enumerate(lines)
    )
    return Markup('<figcaption class="legend">{}</figcaption>').format(entries)


def _finite(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    return [(a, b) for a, b in points if abs(a) < _LARGEST and abs(b) < _LARGEST]  # NaN is not less


def _thin(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    if len(points) <= _MOST:
        return list(points)
    step = (len(points) - 1) / (_MOST - 1)
    return [points[round(place * step)] for place in range(_MOST)]


def _range(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    largest = max(abs(low), abs(high))
    if high - low > max(largest * 1e-9, _SMALLEST):
        return low, high
    if largest < _SMALLEST:
        return 0.0, 1.0
    return low - largest * 0.05, high + largest * 0.05


def _ticks(values: Sequence[float], about: int, *, whole: bool = False) -> list[float]:
    """Return round numbers within, or just around, a range."""
    low, high = _range(values)
    rough = (high - low) / about
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= rough * 0.999)
    if whole:
        step = max(1.0, round(step))
    return list(_multiples(low, high, step))


def _multiples(low: float, high: float, step: float) -> Iterator[float]:
    place = math.ceil(low / step - 1e-9)
    while place * step <= high + step * 1e-9:
        yield round(place * step, 12)
        place += 1
