"""What a picture says in and beside a node."""

from collections.abc import Iterable
from typing import Any

from vpmoe_assets.lineage.graph import Node

_SHORT = {
    "valid_loss": "held-out loss",
    "num_layers": "layers",
    "active_parameters": "active",
    "parameters": "parameters",
}


def label(node: Node) -> list[str]:
    """Return the lines of a node: asset, version, and its first numbers or what became of it."""
    lines = [node.asset, node.version]
    if node.state != "present":
        lines.append("no longer in the store" if node.state == "gone" else "unknown to the store")
    elif node.headline:
        lines.append(numbers(list(node.headline.items())[:2]))
    return lines


def numbers(values: Iterable[tuple[str, Any]]) -> str:
    """Return metrics in a few words: `held-out loss 1.52, 29.3 M parameters`."""
    return ", ".join(_worded(name, value) for name, value in values)


def _worded(name: str, value: Any) -> str:
    word = _SHORT.get(name, name.replace("_", " "))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return f"{word} {value}"
    if isinstance(value, int):
        return f"{_counted(value)} {word}"
    return f"{word} {value:.4g}"


def _counted(value: int) -> str:
    for unit, size in (("G", 10**9), ("M", 10**6), ("k", 10**4)):
        if abs(value) >= size:
            scale = 1000 if unit == "k" else size
            return f"{value / scale:.3g} {unit}"
    return f"{value:,}"
