"""The small JSON reports that people keep in git, composed of what an evaluation left and the one before."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from trainer.contract.canonical import canonical_json
from vpmoe_assets.evaluation.comparison import Report, before, delta, read_report
from vpmoe_assets.evaluation.names import eval_name
from vpmoe_assets.lineage.remarks import Remarks
from vpmoe_assets.lineage.store import Store


def export_reports(store: Store, experiment: str, ladder: Sequence[str], output: Path) -> list[Path]:
    """Write the newest evaluation of each checkpoint to `<output>/eval/core8/<checkpoint>.json`.

    What a person accepted, of the evaluation or of what it came from, is in it under `accepted`.

    Args:
        store: Where the evaluations are.
        experiment: Whose.
        ladder: Its checkpoints, in their order.
        output: Directory to write into.

    Raises:
        LineageError: An evaluation is damaged.
        DataError: Two evaluations cannot be compared.
    """
    evaluated = [name for name in ladder if store.latest(experiment, eval_name(name)) is not None]
    found = {name: store.require(experiment, eval_name(name)) for name in evaluated}
    written, remarks = [], Remarks(store)
    reports = {name: read_report(store.payload(record), name) for name, record in found.items()}
    for name, record in found.items():
        envelope = json.loads((store.directory(record) / "run" / f"{name}.json").read_bytes())
        baseline = before(list(ladder), name)
        content = exported(envelope, experiment, reports[name], reports.get(baseline or ""))
        if accepted := [remark.to_dict() for remark in remarks.about(record)]:
            content["accepted"] = accepted
        target = output / "eval" / "core8" / f"{name}.json"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(canonical_json(content, indent=1) + "\n", encoding="utf-8")
        written.append(target)
    return written


def exported(
    envelope: dict[str, Any], experiment: str, report: Report, baseline: Report | None
) -> dict[str, Any]:
    """Return a report as people keep it.

    Args:
        envelope: The report with the commit, time and provenance of its run.
        experiment: Whose evaluation it is.
        report: The same report.
        baseline: Of the checkpoint before; None where that was not evaluated.
    """
    return {
        **envelope,
        "config": {**envelope["config"], "config": experiment},
        "delta": None if baseline is None else delta(report, baseline),
    }
