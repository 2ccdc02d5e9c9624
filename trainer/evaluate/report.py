"""The report of one checkpoint: what its suites found.

Two forms. The hashed payload holds what was measured and nothing else: `<object>.json` and, one example a
line, `<object>.items.jsonl`. Beside it stands the same report in the envelope of this run, with commit, time
and the digest of the checkpoint's record. What changed since the checkpoint before follows from two reports
and is in neither.
"""

import hashlib
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
) -> Report:
    """Put a report together.

    Args:
        model: The measured checkpoint.
        recipe: The recipe.
        context: What its suites worked with.
        results: Of each suite, by name.
        refused: Reason of each suite that makes no sense for this checkpoint.
    """
    content: dict[str, Any] = {
        "schema_version": SCHEMA,
        "checkpoint_id": context.object,
        "checkpoint_digest": context.digests[context.object],
        "tokenizer_sha256": model.tokenizer.fingerprint,
        "dtype": recipe.dtype,
        "max_len": recipe.max_len,
        "config": {
            "model_format": model.kind,
            "max_per_task": recipe.core8.max_per_task if recipe.core8 else None,
            "seed": recipe.core8.seed if recipe.core8 else None,
            "few_shot_seed": recipe.core8.few_shot_seed if recipe.core8 else None,
            "bundle_digest": context.digests.get("core8_bundle"),
            "inputs": {
                name: digest
                for name, digest in sorted(context.digests.items())
                if name not in recipe.checkpoints
            },
        },
        "metrics": {key: value for result in results.values() for key, value in result.metrics.items()},
        "refused": dict(refused),
        "suites": {name: result.report for name, result in results.items() if name != "core8"},
    }
    if (core8 := results.get("core8")) is not None:
        content |= core8.report
    return Report(content, tuple(item for result in results.values() for item in result.items))


def write_report(report: Report, directory: Path) -> None:
    """Write a report's two payload files: equal reports give equal bytes."""
    lines = "".join(canonical_json(item) + "\n" for item in report.items)
    (directory / f"{report.name}.items.jsonl").write_text(lines, encoding="utf-8")
    text = canonical_json(report.content, indent=1) + "\n"
    (directory / f"{report.name}.json").write_text(text, encoding="utf-8")


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


def enveloped(report: Report, job: Job, fingerprint: str, checkpoint: Path) -> dict[str, Any]:
    """Return the report with what ties it to this run: commit, time, and the checkpoint's provenance.

    Args:
        report: The report.
        job: The job.
        fingerprint: Of this measurement.
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
        "recipe_fingerprint": fingerprint,
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
