"""What changed from one checkpoint to the next: a difference of two reports, never part of either."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpmoe_assets.errors import DataError

_BY_TOKEN = "ppl/"
"""Metrics that are comparable between equal tokenizers only."""
_QUESTIONS = (
    "max_len",
    "config.max_per_task",
    "config.seed",
    "config.few_shot_seed",
    "config.bundle_digest",
)
"""What two reports have to agree on for their tasks to be compared."""


@dataclass(frozen=True)
class Report:
    """A checkpoint's report and its examples, as the trainer wrote them."""

    content: Mapping[str, Any]
    items: tuple[Mapping[str, Any], ...] = ()

    @property
    def name(self) -> str:
        """The checkpoint it is about."""
        return str(self.content["checkpoint_id"])


def read_report(payload: Path, name: str) -> Report:
    """Read the report of a checkpoint from the payload of its evaluation."""
    lines = (payload / f"{name}.items.jsonl").read_text(encoding="utf-8").splitlines()
    content = json.loads((payload / f"{name}.json").read_text(encoding="utf-8"))
    return Report(content, tuple(json.loads(line) for line in lines))


def before(checkpoints: Sequence[str], name: str) -> str | None:
    """Return the checkpoint that another one is compared with: the one before it.

    Args:
        checkpoints: That are evaluated, in the order of the ladder.
        name: One of them.
    """
    place = checkpoints.index(name)
    return checkpoints[place - 1] if place else None


def delta(report: Report, baseline: Report) -> dict[str, Any]:
    """Return what changed against another report, ours minus theirs.

    The paired standard error of a task's accuracy takes the difference of each item (−1, 0 or 1): with n
    items it is the square root of their sample variance over n, smaller than that of two independent runs.

    Args:
        report: Ours.
        baseline: Theirs.

    Raises:
        DataError: They do not rest on the same bundle, protocol and longest sequence.
    """
    ours, theirs = report.content, baseline.content
    asked = "results" in ours and "results" in theirs
    if asked:
        _require_same_questions(report, baseline)
    by_token = ours["tokenizer_sha256"] == theirs["tokenizer_sha256"]
    shared = [
        name
        for name in ours["metrics"]
        if name in theirs["metrics"]
        and not name.endswith("stderr")
        and (by_token or not name.startswith(_BY_TOKEN))
    ]
    found: dict[str, Any] = {
        "compared_to": baseline.name,
        "checkpoint_digest": theirs["checkpoint_digest"],
        "same_tokenizer": by_token,
        "metrics": {name: ours["metrics"][name] - theirs["metrics"][name] for name in shared},
    }
    if asked:
        found["core8_centered_mean"] = ours["core8_centered_mean"] - theirs["core8_centered_mean"]
        found["tasks"] = {label: _paired(label, report, baseline) for label in ours["results"]}
    return found


def sentences(name: str, change: Mapping[str, Any]) -> list[str]:
    """Say what matters of a delta, a line a figure."""
    against = change["compared_to"]
    mean = change.get("core8_centered_mean")
    lines = [] if mean is None else [f"{name}: CORE-8 centred {mean:+.4f} against {against}"]
    for metric, value in change["metrics"].items():
        if metric.endswith("/nll"):
            lines.append(f"{name}: {metric} {value:+.4f} against {against}")
    return lines


def _require_same_questions(report: Report, baseline: Report) -> None:
    ours, theirs = report.content, baseline.content
    wrong = [
        f"{key}: {_at(ours, key)!r} here, {_at(theirs, key)!r} there"
        for key in _QUESTIONS
        if _at(ours, key) != _at(theirs, key)
    ]
    if wrong:
        raise DataError(
            f"{report.name} and {baseline.name} were asked other questions ({'; '.join(wrong)}), so their "
            f"difference means nothing; evaluate {baseline.name} and {report.name} again"
        )


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _paired(label: str, report: Report, baseline: Report) -> dict[str, Any]:
    mine, other = _answers(report, label), _answers(baseline, label)
    if mine.keys() != other.keys():
        raise DataError(
            f"{label}: {report.name} answered {len(mine)} items and {baseline.name} {len(other)}, not the "
            f"same ones; evaluate {baseline.name} and {report.name} again"
        )
    changes = [int(mine[row]["correct"]) - int(other[row]["correct"]) for row in mine]
    n = len(changes)
    mean = sum(changes) / n
    variance = sum((change - mean) ** 2 for change in changes) / (n - 1) if n > 1 else 0.0
    same = sum(
        (mine[row]["correct"], mine[row]["prediction"]) == (other[row]["correct"], other[row]["prediction"])
        for row in mine
    )
    centred = "centered_results"
    return {
        "acc": mean,
        "centered": report.content[centred][label] - baseline.content[centred][label],
        "stderr": math.sqrt(variance / n),
        "gained": changes.count(1),
        "lost": changes.count(-1),
        "agreement": same / n,
    }


def _answers(report: Report, label: str) -> dict[int, Mapping[str, Any]]:
    return {item["row"]: item for item in report.items if item["task"] == label}
