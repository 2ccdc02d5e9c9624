"""Which curves are drawn of a run, and what they are called: for the pages and for Dagster's."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from markupsafe import Markup

from vpmoe_assets.browse.charts import Line, line_chart

Points = Sequence[Mapping[str, Any]]
"""Lines of `metrics.jsonl`."""

BY_SPAN = {
    "kl": "divergence\nnats",
    "heldout_kl": "divergence\nheld out",
    "ce": "cross-entropy\nnats",
    "top1_agreement": "top token\nas the teacher's",
    "clipped": "clipped\nadvantages",
}
"""Panels of a run from a teacher, a line for each span: what the axis says, by the first part of the keys."""

ROLLOUTS = {
    "teacher − student\nnats": {
        "rollouts/teacher_gap/rollout_reasoning": "reasoning",
        "rollouts/teacher_gap/rollout_final": "final",
    },
    "share of answers": {"rollouts/valid_rate": "valid", "rollouts/end_rate": "ended"},
    "tokens of an answer": {
        "rollouts/length": "all",
        "rollouts/length/low": "low",
        "rollouts/length/medium": "medium",
        "rollouts/length/high": "high",
    },
    "entropy\nnats": {"rollouts/entropy": "entropy"},
    "prompts\nby mode": {
        "rollouts/mode/low": "low",
        "rollouts/mode/medium": "medium",
        "rollouts/mode/high": "high",
    },
    "share of\na step": {
        "rollouts/answering_share": "student answers",
        "rollouts/teacher_share": "teacher scores",
        "rollouts/teacher_wait_share": "waits for it",
    },
    "rollouts": {
        "rollouts/trained": "trained",
        "rollouts/waiting": "waiting",
        "rollouts/dropped": "dropped",
    },
}
"""Panels of an on-policy run: label of a line by key of the metric."""

_LOSS = {
    "loss": "training objective",
    "heldout_objective": "the same, held out",
    "heldout_loss": "held out, per token",
}
_PREFIXES = {
    "loss": "Loss by part, nats",
    "heldout_loss": "Held-out loss by part, nats per token",
    **{name: axis.replace("\n", ", ") for name, axis in BY_SPAN.items()},
    "lr": "Learning rate",
}
_SINGLE = {
    "grad_norm": "Norm of the gradient",
    "tokens_per_second": "Tokens per second",
    "moe/router_agg/mean_entropy": "Entropy of the router, nats",
    "moe/router_agg/dead_experts_count": "Experts without a token",
}


def training_charts(points: Points) -> list[Markup]:
    """Return the charts of a run, the loss first; none where nothing was logged."""
    return [chart for chart in _training(points) if chart]


def layer_charts(rows: Points, most: int = 6) -> list[Markup]:
    """Return a chart for each quantity that a conversion measured layer by layer and that varies."""
    charts = []
    for column in rows[0] if rows and "layer" in rows[0] else ():
        series = [(row["layer"], row[column]) for row in rows if _is_number(row.get(column))]
        if column not in ("layer", "parent_layer") and len({value for _, value in series}) > 1:
            title = column.replace("_", " ")
            charts.append(line_chart([Line(column, series)], title=title, x="layer"))
    return charts[:most]


def _training(points: Points) -> Iterator[Markup]:
    yield line_chart([_line(points, key, label) for key, label in _LOSS.items()], title="Loss, nats")
    keys = sorted({key for point in points for key in point})
    for prefix, title in _PREFIXES.items():
        parts = [key for key in keys if key.startswith(f"{prefix}/")]
        yield line_chart([_line(points, key, key.partition("/")[2]) for key in parts], title=title)
    for axis, lines in ROLLOUTS.items():
        shown = [_line(points, key, label) for key, label in lines.items()]
        yield line_chart(shown, title=axis.replace("\n", ", ").capitalize())
    for key, title in _SINGLE.items():
        yield line_chart([_line(points, key, title)], title=title)


def _line(points: Points, key: str, label: str) -> Line:
    return Line(label, [(p["step"], p[key]) for p in points if _is_number(p.get(key)) and "step" in p])


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
