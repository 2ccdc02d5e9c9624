"""The report of one checkpoint: what its suites found, and what that is against the rung before.

Two forms. The hashed payload holds what was measured and nothing else: `<object>.json` and, one example a
line, `<object>.items.jsonl`. Beside it stands the same report in the envelope of this run, with commit, time
and the digest of the checkpoint's record: the form that people keep in git.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from trainer.contract.canonical import canonical_json
from trainer.contract.schema.evaluate import EvaluateRecipe
from trainer.contract.schema.job import Job
from trainer.errors import EvaluationError
from trainer.evaluate.models import LanguageModel
from trainer.evaluate.suite import SuiteContext, SuiteResult

SCHEMA = "vpmoe.eval/1"
_COMMIT = re.compile(r"[0-9a-f]{40}")
_BY_TOKEN = "ppl/"
"""Metrics that are comparable between equal tokenizers only."""


@dataclass(frozen=True)
class Report:
    """A report and its examples, as in the payload."""

    content: Mapping[str, Any]
    items: tuple[Mapping[str, Any], ...]

    @property
    def name(self) -> str:
        """The object it is about."""
        return str(self.content["checkpoint_id"])


def compose(
    model: LanguageModel,
    recipe: EvaluateRecipe,
    context: SuiteContext,
    results: Mapping[str, SuiteResult],
    refused: Mapping[str, str],
    *,
    experiment: str,
    baseline: Report | None,
) -> Report:
    """Put a report together.

    Args:
        model: The measured checkpoint.
        recipe: The recipe.
        context: What its suites worked with.
        results: Of each suite, by name.
        refused: Reason of each suite that makes no sense for this checkpoint.
        experiment: Name of the experiment.
        baseline: Report to take deltas against.

    Raises:
        EvaluationError: The baseline answered other questions than this report.
    """
    content: dict[str, Any] = {
        "schema_version": SCHEMA,
        "checkpoint_id": context.object,
        "checkpoint_digest": context.digests[context.object],
        "tokenizer_sha256": model.tokenizer.fingerprint,
        "dtype": recipe.dtype,
        "max_len": recipe.max_len,
        "config": {
            "config": experiment,
            "model_format": model.kind,
            "max_per_task": recipe.core8.max_per_task if recipe.core8 else None,
            "seed": recipe.core8.seed if recipe.core8 else None,
            "few_shot_seed": recipe.core8.few_shot_seed if recipe.core8 else None,
            "bundle_digest": context.digests.get("core8_bundle"),
            "inputs": {
                name: digest
                for name, digest in sorted(context.digests.items())
                if name not in recipe.checkpoints and not name.startswith("eval_")
            },
        },
        "metrics": {key: value for result in results.values() for key, value in result.metrics.items()},
        "refused": dict(refused),
        "suites": {name: result.report for name, result in results.items() if name != "core8"},
    }
    if (core8 := results.get("core8")) is not None:
        content |= core8.report
    report = Report(content, tuple(item for result in results.values() for item in result.items))
    content["delta"] = None if baseline is None else delta(report, baseline)
    return report


def delta(report: Report, baseline: Report) -> dict[str, Any]:
    """Return what changed against another report, ours minus theirs.

    The paired standard error of a task's accuracy takes the difference of each item (−1, 0 or 1): with n
    items it is the square root of their sample variance over n, smaller than that of two independent runs.

    Args:
        report: Ours; its own `delta` is not read.
        baseline: Theirs.

    Raises:
        EvaluationError: They do not rest on the same bundle, protocol and longest sequence.
    """
    ours, theirs = report.content, baseline.content
    if "results" in ours and "results" in theirs:
        keys = (
            "max_len",
            "config.max_per_task",
            "config.seed",
            "config.few_shot_seed",
            "config.bundle_digest",
        )
        wrong = [
            f"{key}: {_at(ours, key)!r} here, {_at(theirs, key)!r} there"
            for key in keys
            if _at(ours, key) != _at(theirs, key)
        ]
        if wrong:
            raise EvaluationError(
                f"{report.name} and {baseline.name} were asked other questions ({'; '.join(wrong)}), so "
                "their difference means nothing; evaluate the baseline again"
            )
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
    if "results" in ours and "results" in theirs:
        found["core8_centered_mean"] = ours["core8_centered_mean"] - theirs["core8_centered_mean"]
        found["tasks"] = {label: _paired(label, report, baseline) for label in ours["results"]}
    return found


def _at(tree: Any, path: str) -> Any:
    for key in path.split("."):
        tree = tree[key]
    return tree


def _paired(label: str, report: Report, baseline: Report) -> dict[str, Any]:
    mine, other = _answers(report, label), _answers(baseline, label)
    if mine.keys() != other.keys():
        raise EvaluationError(
            f"{label}: {report.name} answered {len(mine)} items and {baseline.name} {len(other)}, not the "
            "same ones; evaluate the baseline again"
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


def write_report(report: Report, directory: Path) -> None:
    """Write a report's two payload files: equal reports give equal bytes."""
    lines = "".join(canonical_json(item) + "\n" for item in report.items)
    (directory / f"{report.name}.items.jsonl").write_text(lines, encoding="utf-8")
    text = canonical_json(report.content, indent=1) + "\n"
    (directory / f"{report.name}.json").write_text(text, encoding="utf-8")


def read_report(directory: Path, name: str) -> Report:
    """Read what `write_report` wrote.

    Raises:
        EvaluationError: A file is missing, or is not such a report.
    """
    try:
        content = json.loads((directory / f"{name}.json").read_text(encoding="utf-8"))
        lines = (directory / f"{name}.items.jsonl").read_text(encoding="utf-8").splitlines()
    except OSError as error:
        raise EvaluationError(
            f"the baseline report of {name} is missing: {error.filename} ({error.strerror}); evaluate {name} "
            "first, or take compare_to out of the recipe"
        ) from error
    if content.get("schema_version") != SCHEMA or content.get("checkpoint_id") != name:
        raise EvaluationError(
            f"{directory / name}.json: schema_version {content.get('schema_version')!r} about "
            f"{content.get('checkpoint_id')!r} found, {SCHEMA!r} about {name!r} expected"
        )
    return Report(content, tuple(json.loads(line) for line in lines))


def require_commit(job: Job) -> None:
    """Refuse a job whose commit is not known: a report without one could not be traced.

    Raises:
        EvaluationError: `provenance.git_sha` is not a commit.
    """
    if not _COMMIT.fullmatch(job.provenance.git_sha):
        raise EvaluationError(
            f"provenance.git_sha = {job.provenance.git_sha!r} is no commit of 40 hex digits; a report must "
            "name the code that made it (set VPMOE_GIT_SHA where there is no git)"
        )


def enveloped(report: Report, job: Job, checkpoint: Path) -> dict[str, Any]:
    """Return the report with what ties it to this run: commit, time, and the checkpoint's provenance.

    Args:
        report: The report.
        job: The job.
        checkpoint: Directory of the checkpoint; its record stands beside it where it came from the store.
    """
    record = checkpoint.parent / ".artifact.json"
    provenance = record if record.is_file() else checkpoint / "config.json"
    return {
        **report.content,
        "git_sha": job.provenance.git_sha,
        "git_dirty": job.provenance.git_dirty,
        "created_utc": datetime.now(UTC).isoformat(timespec="seconds"),
        "checkpoint_provenance_sha256": hashlib.sha256(provenance.read_bytes()).hexdigest(),
        "recipe_fingerprint": job.recipe_fingerprint,
    }


def check_finite(suite: str, metrics: Sequence[tuple[str, Any]]) -> None:
    """Refuse a metric that is not a finite number.

    Raises:
        EvaluationError: Naming it.
    """
    for name, value in metrics:
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
            raise EvaluationError(
                f"suite {suite}: {name} = {value!r} is not a finite number; the checkpoint's weights or "
                "activations have overflowed"
            )
