"""A card from a record: what a checkpoint or data set is, what it was made of, and what was found of it.

Markdown with front matter in YAML, whose strings are JSON's (YAML takes them). It says nothing that no record
or statement says; what a person has to say of use and limits is left to him.
"""

import json
from collections.abc import Mapping, Sequence
from typing import Any

from vpmoe_assets.lineage.adoption import is_adopted, origin
from vpmoe_assets.lineage.comparison import kind_of
from vpmoe_assets.lineage.errors import ComparisonError
from vpmoe_assets.lineage.graph import Graph, ancestors
from vpmoe_assets.lineage.layout import version_name
from vpmoe_assets.lineage.origins import origins
from vpmoe_assets.lineage.record import EvalScore, Record
from vpmoe_assets.lineage.row_files import RowFiles, row_files
from vpmoe_assets.lineage.standing import Finding
from vpmoe_assets.lineage.store import Store


def model_card(store: Store, record: Record) -> str:
    """Return the card of a checkpoint.

    Args:
        store: Where it is, with what it was made of and what evaluated it.
        record: Of the checkpoint.

    Raises:
        ComparisonError: It is no checkpoint.
    """
    if (kind := kind_of(record)) != "checkpoint":
        raise ComparisonError(
            f"{version_name(record)} is of kind {kind}, and a card is of a checkpoint or a data set; "
            "`vpmoe show` and `vpmoe lineage` tell of anything"
        )
    scores = _scores(store, record)
    front = {
        "library_name": "megatron-core",
        "model_name": f"{record.experiment}/{record.asset}",
        "tags": ["vpmoe", record.experiment, record.asset],
        "model-index": _model_index(record, scores),
    }
    parts = [
        *_head(record, front),
        *_section("Numbers", _table(("metric", "value"), sorted(record.metrics.items()))),
        *_section(
            "Evaluation",
            _table(
                ("suite", "task", "score", "of"),
                [(each.suite, each.task, f"{each.score:.4g}", each.total) for each in scores],
            ),
        ),
        *_tail(store, record),
    ]
    return "\n".join(parts) + "\n"


def data_card(store: Store, record: Record) -> str:
    """Return the card of a data set; `vpmoe_assets.lineage.croissant` says the same to programs.

    Args:
        store: Where it is, with what it was made of.
        record: Of the data set.

    Raises:
        ComparisonError: Its rows cannot be read.
    """
    told, groups = origins(store, record), row_files(record, store.payload(record))
    licenses = list(dict.fromkeys(each.license for each in told if each.license))
    front = {
        "pretty_name": f"{record.experiment}/{record.asset}",
        "tags": ["vpmoe", record.experiment, record.asset],
        "license": "other" if licenses else None,
        "license_link": licenses[0] if len(licenses) == 1 else None,
    }
    fields = [
        (group.name, each.name, f"list of {each.type}" if each.many else each.type, each.description)
        for group in groups
        for each in group.fields
    ]
    parts = [
        *_head(record, front),
        *_section("Rows", _table(("set", "form", "files", "rows"), [_counts(group) for group in groups])),
        *_section("Fields", _table(("set", "field", "type", ""), fields)),
        *_section(
            "Sources",
            _table(
                ("source", "what", "terms", "cite"),
                [(each.asset, each.description, each.license or "not known", each.citation) for each in told],
            ),
        ),
        *_section("Numbers", _table(("metric", "value"), sorted(record.metrics.items()))),
        *_tail(store, record),
    ]
    return "\n".join(parts) + "\n"


def _counts(group: RowFiles) -> tuple[Any, ...]:
    return group.name, group.form, len(group.paths), group.rows


def _head(record: Record, front: Mapping[str, Any]) -> list[str]:
    """Return front matter, title, and what an artifact is known by."""
    code = record.code.git_sha + (" with changes" if record.code.git_dirty else "")
    return [
        "---",
        *(f"{key}: {json.dumps(value)}" for key, value in front.items() if value),
        "---",
        "",
        f"# {record.experiment}/{record.asset}",
        "",
        *_table(
            ("", ""),
            [
                ("version", record.version),
                ("content digest", f"`{record.digest}`"),
                ("record digest", f"`{record.record_digest}`"),
                ("recipe fingerprint", f"`{record.fingerprint}`"),
                ("published", record.published_utc),
                ("origin", origin(record)) if is_adopted(record) else ("code", code),
            ],
        ),
    ]


def _tail(store: Store, record: Record) -> list[str]:
    """Return what is said of any artifact: checks, ancestry, recipe, files."""
    written = ["```json", json.dumps(record.recipe, indent=1, sort_keys=True), "```"]
    return [
        *_section("Checks", _checks(store.findings(record))),
        *_section("Made of", _lineage(ancestors(store, record))),
        *_section("Recipe", [] if is_adopted(record) else written),
        *_section("Files", _table(("file", "bytes", "sha256"), _files(record))),
    ]


def _scores(store: Store, record: Record) -> list[EvalScore]:
    """Return the scores in the latest evaluations of the experiment that are of this very version."""
    found: list[EvalScore] = []
    for asset in store.assets(record.experiment):
        head = store.latest(record.experiment, asset)
        if head and any(reference.record_digest == record.record_digest for reference in head.inputs):
            of_it = (record.asset, record.version)
            found += [
                each for each in store.record(head).evals if (each.object_asset, each.object_version) == of_it
            ]
    return found


def _metric_type(score: EvalScore) -> str:
    """Return what a score is: of the tasks of CORE-8 an accuracy; of all else what its name ends with."""
    if score.suite == "core8":
        return "centered_accuracy" if score.task == "mean" else "accuracy"
    return score.task.rpartition("/")[2]


def _model_index(record: Record, scores: Sequence[EvalScore]) -> list[dict[str, Any]]:
    results = [
        {
            "task": {"type": "text-generation"},
            "dataset": {"name": each.suite, "type": each.suite},
            "metrics": [{"type": _metric_type(each), "name": each.task, "value": each.score}],
        }
        for each in scores
    ]
    return [{"name": record.asset, "results": results}] if results else []


def _checks(found: Sequence[Finding]) -> list[str]:
    return _table(("check", "outcome", ""), [(each.check, each.outcome, each.reason) for each in found])


def _lineage(graph: Graph) -> list[str]:
    return [
        f"{'  ' * line.depth}- {line.node.asset}@{line.node.version} `{line.node.digest[:12]}`"
        + ("" if line.node.state == "present" else f" ({line.node.state})")
        + (" (see above)" if line.repeated else "")
        for line in graph.tree()
    ]


def _files(record: Record) -> list[tuple[Any, ...]]:
    return [(f"`{entry.path}`", entry.size, f"`{entry.sha256}`") for entry in record.files]


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return ["", f"## {title}", "", *lines] if lines else []


def _table(columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> list[str]:
    if not rows:
        return []
    lines = [f"| {' | '.join(columns)} |", f"|{' --- |' * len(columns)}"]
    return lines + [f"| {' | '.join(map(_cell, row))} |" for row in rows]


def _cell(value: Any) -> str:
    text = "" if value is None else f"{value:.6g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")
