"""A report of a profile as tables on a terminal."""

import sys
from collections.abc import Mapping
from typing import Any

from rich.console import Console
from rich.table import Table

from trainer.profiling.report import sentence


def print_report(content: Mapping[str, Any]) -> None:
    """Print where the time of a step goes."""
    parts = Table(title="parts of a step", title_justify="left")
    for label in ("part", "ms", "share"):
        parts.add_column(label, justify="left" if label == "part" else "right")
    whole = content["ms_per_step"]["mean"]
    for name, ms in sorted(content["parts_ms"].items(), key=lambda pair: -pair[1]):
        parts.add_row(name, f"{ms:,.2f}", f"{ms / whole:.1%}")
    layers = content["layers"]
    kinds = Table(
        title=f"kinds of layers: time of {layers['time']}, of {layers['measured_on']}", title_justify="left"
    )
    for label in ("kind", "ms", "forward", "backward", "at the least"):
        kinds.add_column(label, justify="left" if label == "kind" else "right")
    for row in layers["kinds"]:
        floor = "" if row["floor_ms"] is None else f"{row['floor_ms']:,.2f}"
        numbers = (f"{row[name]:,.2f}" for name in ("ms", "forward_ms", "backward_ms"))
        kinds.add_row(row["kind"], *numbers, floor)
    console = Console(width=None if sys.stdout.isatty() else 130)
    console.width = max(console.width, 60)  # of a terminal that says it has none
    with console.capture() as captured:  # rich has its own way to end where nobody reads
        console.print(parts, kinds, sep="\n")
    print(captured.get(), end="")
    print(sentence(content))
