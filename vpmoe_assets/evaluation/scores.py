"""The scores of a report of the trainer, as the index keeps them and as a person reads them."""

from collections.abc import Mapping
from typing import Any

from vpmoe_assets.lineage.record import EvalScore


def scores(report: Mapping[str, Any], asset: str, version: str) -> tuple[EvalScore, ...]:
    """Return the rows of the index's `evals`: tasks with their counts, every other metric by its name.

    Args:
        report: Of one checkpoint.
        asset: The checkpoint.
        version: Of the checkpoint.
    """
    return (*_core8(report, asset, version), *_other_suites(report["metrics"], asset, version))


def _core8(report: Mapping[str, Any], asset: str, version: str) -> list[EvalScore]:
    """Each task, then the mean of them all; nothing where CORE-8 was not measured."""
    rows = [
        EvalScore(
            object_asset=asset,
            object_version=version,
            suite="core8",
            task=task,
            score=accuracy,
            centered=report["centered_results"][task],
            correct=report["counts"][task]["correct"],
            total=report["counts"][task]["total"],
            stderr=report["stderr"]["tasks"][task],
        )
        for task, accuracy in report.get("results", {}).items()
    ]
    mean = report.get("core8_centered_mean")
    if mean is None:
        return rows
    error = report["stderr"]["core8_centered_mean"]
    whole = EvalScore(
        object_asset=asset,
        object_version=version,
        suite="core8",
        task="mean",
        score=mean,
        centered=mean,
        stderr=error,
    )
    return [*rows, whole]


def _other_suites(metrics: Mapping[str, Any], asset: str, version: str) -> list[EvalScore]:
    rows = []
    for name, value in metrics.items():
        suite, _, task = name.partition("/")
        if suite != "core8" and not name.endswith("stderr"):
            rows.append(
                EvalScore(
                    object_asset=asset,
                    object_version=version,
                    suite=suite,
                    task=task,
                    score=value,
                    stderr=metrics.get(f"{name.rpartition('/')[0]}/stderr"),
                )
            )
    return rows


def core8_table(report: Mapping[str, Any], delta: Mapping[str, Any] | None) -> list[dict[str, Any]]:
    """Return CORE-8 task by task, with the change since the checkpoint before; empty where it was not run."""
    changes = (delta or {}).get("tasks", {})
    return [
        {
            "task": task,
            "correct": f"{report['counts'][task]['correct']} of {report['counts'][task]['total']}",
            "accuracy": accuracy,
            "stderr": report["stderr"]["tasks"][task],
            "centred": report["centered_results"][task],
            "change": changes[task]["acc"] if task in changes else "",
        }
        for task, accuracy in report.get("results", {}).items()
    ]
