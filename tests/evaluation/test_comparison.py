"""What changed between two reports, and the form of a report that people keep."""

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.lineage.fabricate import publish
from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation.comparison import Report, before, delta, read_report, sentences
from vpmoe_assets.evaluation.export import export_reports
from vpmoe_assets.lineage.errors import ArtifactDamaged
from vpmoe_assets.lineage.store import Store

Answers = list[tuple[bool, int]]


def report(name: str, answers: Answers | None, *, tokenizer: str = "t", **config: Any) -> Report:
    """A report of one task; without answers, of held-out loss alone."""
    content: dict[str, Any] = {
        "checkpoint_id": name,
        "checkpoint_digest": f"digest of {name}",
        "tokenizer_sha256": tokenizer,
        "max_len": 512,
        "config": {"max_per_task": 5, "seed": 1, "few_shot_seed": 1, "bundle_digest": "b", **config},
        "metrics": {"ppl/text/nll": 3.0 + len(name), "ppl/text/stderr": 0.1, "numeric/characters": 0.5},
        "refused": {},
    }
    if answers is None:
        return Report(content)
    right = sum(correct for correct, _ in answers) / len(answers)
    content |= {
        "results": {"piqa": right},
        "centered_results": {"piqa": 2 * right - 1},
        "core8_centered_mean": 2 * right - 1,
    }
    items = [
        {"task": "piqa", "row": row, "correct": correct, "prediction": prediction}
        for row, (correct, prediction) in enumerate(answers)
    ]
    return Report(content, tuple(items))


pairs = st.lists(st.tuples(*[st.booleans(), st.integers(0, 3)] * 2), min_size=1, max_size=40)


@given(pairs)
def test_a_task_is_compared_item_by_item(answers: list[tuple[bool, int, bool, int]]) -> None:
    ours = report("ours", [(a, b) for a, b, _, _ in answers])
    theirs = report("theirs", [(c, d) for _, _, c, d in answers])
    task = delta(ours, theirs)["tasks"]["piqa"]
    n = len(answers)
    gained = sum(a and not c for a, _, c, _ in answers)
    lost = sum(c and not a for a, _, c, _ in answers)
    assert (task["gained"], task["lost"]) == (gained, lost)
    assert task["acc"] == pytest.approx(ours.content["results"]["piqa"] - theirs.content["results"]["piqa"])
    assert task["agreement"] == sum((a, b) == (c, d) for a, b, c, d in answers) / n
    squares = gained + lost - n * task["acc"] ** 2
    assert task["stderr"] == pytest.approx(math.sqrt(max(squares, 0) / (n - 1) / n) if n > 1 else 0, abs=1e-9)


def test_losses_are_compared_between_equal_tokenizers_only() -> None:
    ours, theirs = report("student", None), report("donor", None)
    same = delta(ours, theirs)
    assert same["metrics"] == {"ppl/text/nll": 2.0, "numeric/characters": 0.0}
    assert same["compared_to"] == "donor"
    assert sentences("student", same) == ["student: ppl/text/nll +2.0000 against donor"]
    other = delta(ours, report("donor", None, tokenizer="u"))
    assert (other["same_tokenizer"], other["metrics"]) == (False, {"numeric/characters": 0.0})


def test_reports_that_answer_other_questions_are_not_compared() -> None:
    ours = report("student", [(True, 0)])
    with pytest.raises(DataError, match=r"other questions \(config.max_per_task: 5 here, 4 there\)"):
        delta(ours, report("donor", [(True, 0)], max_per_task=4))
    with pytest.raises(DataError, match="student answered 1 items and donor 2"):
        delta(ours, report("donor", [(True, 0), (False, 1)]))
    assert delta(ours, report("donor", None, max_per_task=4))["metrics"], "no question was asked of the donor"


def test_a_checkpoint_is_compared_with_the_one_before_it() -> None:
    assert [before(["a", "b", "c"], name) for name in "abc"] == [None, "a", "b"]


def evaluated(store: Store, name: str, experiment: str, answers: Answers) -> None:
    found = report(name, answers)
    lines = "".join(json.dumps(item) + "\n" for item in found.items)
    publish(
        store,
        f"eval_{name}",
        experiment=experiment,
        files={f"{name}.json": json.dumps(found.content).encode(), f"{name}.items.jsonl": lines.encode()},
        run={f"{name}.json": json.dumps({**found.content, "git_sha": "a" * 40}).encode()},
    )


def test_an_exported_report_names_experiment_commit_and_what_changed(tmp_path: Path) -> None:
    store = Store(tmp_path / "artifacts")
    ladder = ("donor", "never_evaluated", "student", "healed")
    evaluated(store, "student", "tiny", [(True, 0)])
    evaluated(store, "healed", "tiny", [(False, 1)])
    written = export_reports(store, "tiny", ladder, tmp_path / "reports")
    assert [path.name for path in written] == ["student.json", "healed.json"]
    student, healed = (json.loads(path.read_bytes()) for path in written)
    assert student["delta"] is None
    assert (healed["git_sha"], healed["config"]["config"]) == ("a" * 40, "tiny")
    assert healed["delta"]["compared_to"] == "student"
    assert healed["delta"]["core8_centered_mean"] == -2.0
    stored = store.require("tiny", "eval_healed")
    assert b"tiny" not in (store.payload(stored) / "healed.json").read_bytes()

    damaged = store.payload(stored) / "healed.json"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes().replace(b"512", b"513"))
    with pytest.raises(ArtifactDamaged, match=r"healed\.json"):
        export_reports(store, "tiny", ladder, tmp_path / "reports")


def test_a_report_is_read_as_the_trainer_writes_it(tmp_path: Path) -> None:
    from trainer.evaluate.report import Report as Written
    from trainer.evaluate.report import write_report

    found = report("donor", [(True, 0), (False, 3)])
    write_report(Written(found.content, found.items), tmp_path)
    assert read_report(tmp_path, "donor") == found
