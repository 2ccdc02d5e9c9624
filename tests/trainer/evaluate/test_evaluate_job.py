"""Whole evaluation jobs: reports, deltas, resuming, and what is refused before any work."""

import json
from pathlib import Path
from typing import Any

import pytest

from tests.trainer.evaluate.evaluation_inputs import (
    architecture,
    write_bundle,
    write_conversations,
    write_llama,
    write_text,
)
from trainer.__main__ import main
from trainer.contract.schema.base import plain
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.evaluate import core8
from trainer.evaluate.suite import SuiteContext

pytestmark = pytest.mark.slow

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def inputs(tmp_path_factory, llama_dir, student_dir, ranks):
    root = tmp_path_factory.mktemp("inputs")
    return {
        "donor": llama_dir,
        "changed": write_llama(root / "changed", seed=1),
        "student": student_dir,
        "core8_bundle": write_bundle(root / "bundle"),
        "o200k_tokenizer": ranks,
        "healing_text_v1": write_text(root / "text", [30, 20]),
        "synth_kd_v1": write_conversations(root / "talk", [40, 30]),
    }


class EvaluationJob:
    """A job file under construction."""

    def __init__(self, root: Path, inputs: dict[str, Path], *objects: str, suites=("core8",)) -> None:
        self.root = root
        data = ("core8_bundle", "o200k_tokenizer", "healing_text_v1", "synth_kd_v1")
        self.content: dict[str, Any] = {
            "schema": "vpmoe.job/1",
            "command": "evaluate",
            "asset": "eval_test",
            "experiment": "smoke",
            "recipe": {
                "checkpoints": {name: {"format": "huggingface"} for name in objects},
                "suites": list(suites),
                "max_len": 512,
                "dtype": "fp32",
                "ppl_tokens": 60,
                "generation": {"prompts": 1, "max_new_tokens": 4, "greedy": True},
                "core8": {"seed": 1337, "max_per_task": 5},
            },
            "recipe_fingerprint": "f" * 64,
            "seed": 1,
            "inputs": {},
            "execution": {"device": "cpu"},
            "provenance": {"git_sha": COMMIT, "git_dirty": False, "source_digest": "s", "lock_digest": "l"},
            "work_dir": str(root / "work"),
            "output_dir": str(root / "output"),
        }
        for name in (*objects, *data):
            self.give(name, inputs[name])
        if "student" in objects:
            self.checkpoint("student", format="megatron", architecture=plain(architecture()))

    def give(self, name: str, path: Path) -> None:
        self.content["inputs"][name] = {"path": str(path), "digest": f"digest of {name}"}

    def checkpoint(self, name: str, **changes: Any) -> None:
        self.content["recipe"]["checkpoints"][name] |= changes

    def run(self, *flags: str) -> int:
        self.root.mkdir(exist_ok=True)
        (self.root / "job.json").write_text(json.dumps(self.content))
        return main(["evaluate", "--job", str(self.root / "job.json"), *flags])

    def payload(self) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in sorted((self.root / "output" / "payload").iterdir())}

    def report(self, name: str, where: str = "payload") -> dict[str, Any]:
        return json.loads((self.root / "output" / where / f"{name}.json").read_text())

    def summary(self) -> dict[str, Any]:
        return json.loads((self.root / "output" / "summary.json").read_text())

    def status(self) -> str:
        return (self.root / "work" / "STATUS").read_text()


@pytest.fixture
def make(tmp_path, inputs):
    return lambda name, *objects, **more: EvaluationJob(tmp_path / name, inputs, *objects, **more)


def test_checkpoints_of_both_kinds_are_measured_in_one_process(make):
    job = make("job", "changed", "donor", "student", suites=("core8", "ppl"))
    job.checkpoint("changed", compare_to="donor")
    assert job.run("--batch-rows", "3") == EXIT_DONE
    donor, changed, student = (job.report(name) for name in ("donor", "changed", "student"))
    for report in (donor, changed, student):
        assert report["schema_version"] == "vpmoe.eval/1"
        assert report["results"].keys() == report["stderr"]["tasks"].keys() == report["counts"].keys()
        assert (report["max_len"], report["dtype"]) == (512, "fp32")
        assert report["config"]["bundle_digest"] == "digest of core8_bundle"
    assert donor["delta"] is None
    assert "another tokenizer" in donor["refused"]["ppl"]
    assert "ppl" not in donor["suites"]
    assert not student["refused"]
    assert student["suites"]["ppl"]["healing_text_v1"]["tokens"] == 48
    assert [layer["layer"] for layer in student["suites"]["router"]["layers"]] == [2, 3, 4]
    assert student["tokenizer_sha256"] != donor["tokenizer_sha256"] == changed["tokenizer_sha256"]

    summary = job.summary()
    assert list(summary["objects"]) == ["changed", "donor", "student"]
    assert summary["objects"]["student"]["metrics"] == student["metrics"]
    assert summary["batching"]["rows"] == 3
    assert summary["payload"] == sorted(job.payload())
    lines = [json.loads(line) for line in (job.root / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert job.status() == "done\n"


def test_a_payload_is_the_same_bytes_again_and_its_envelope_names_commit_and_time(make):
    first, second = make("first", "student", suites=("core8", "ppl")), make("second", "student")
    second.content["recipe"]["suites"] = ["core8", "ppl"]
    second.content["provenance"]["git_sha"] = "f" * 40
    assert (first.run(), second.run()) == (EXIT_DONE, EXIT_DONE)
    assert first.payload() == second.payload()
    for text in first.payload().values():
        assert COMMIT.encode() not in text
        assert str(first.root).encode() not in text
    envelope = first.report("student", "reports")
    assert envelope["git_sha"] == COMMIT
    assert envelope["created_utc"].startswith("20")
    assert len(envelope["checkpoint_provenance_sha256"]) == 64
    content = first.report("student")
    assert {key: envelope[key] for key in content} == content


def test_deltas_are_taken_against_a_report_from_an_earlier_job(make):
    base = make("base", "donor")
    assert base.run() == EXIT_DONE
    job = make("job", "changed")
    job.checkpoint("changed", compare_to="donor")
    job.give("eval_donor", base.root / "output" / "payload")
    assert job.run() == EXIT_DONE
    ours, theirs, delta = job.report("changed"), base.report("donor"), job.report("changed")["delta"]
    assert delta["compared_to"] == "donor"
    assert delta["core8_centered_mean"] == ours["core8_centered_mean"] - theirs["core8_centered_mean"]
    lines = [
        [json.loads(line) for line in each.payload()[f"{name}.items.jsonl"].splitlines()]
        for each, name in ((job, "changed"), (base, "donor"))
    ]
    for label, task in delta["tasks"].items():
        mine, other = ({item["row"]: item for item in each if item["task"] == label} for each in lines)
        gained = sum(mine[row]["correct"] and not other[row]["correct"] for row in mine)
        lost = sum(other[row]["correct"] and not mine[row]["correct"] for row in mine)
        assert (task["gained"], task["lost"]) == (gained, lost)
        assert task["acc"] == pytest.approx((gained - lost) / 5)
        assert task["acc"] == pytest.approx(ours["results"][label] - theirs["results"][label])
        same = sum(
            mine[row]["prediction"] == other[row]["prediction"]
            and mine[row]["correct"] == other[row]["correct"]
            for row in mine
        )
        assert task["agreement"] == same / 5

    job.content["recipe"]["core8"]["max_per_task"] = 4
    assert job.run() == EXIT_FAILED
    assert "other questions (config.max_per_task: 4 here, 5 there)" in job.status()
    assert not (job.root / "output" / "summary.json").exists()


def test_a_missing_baseline_is_refused_before_any_work(make, monkeypatch):
    monkeypatch.setattr(core8, "evaluate_task", None)
    job = make("job", "changed")
    job.checkpoint("changed", compare_to="donor")
    assert job.run() == EXIT_FAILED
    assert "compared with donor, whose report is missing: give the input eval_donor" in job.status()
    job.give("eval_donor", job.root)
    assert job.run() == EXIT_FAILED
    assert "the baseline report of donor is missing" in job.status()


def test_a_stopped_job_goes_on_with_the_next_task(make, monkeypatch):
    job, straight = make("job", "donor", "changed"), make("straight", "donor", "changed")
    assert straight.run() == EXIT_DONE
    real, asked = core8.evaluate_task, []

    def stopping(model, task, protocol, max_len, context: SuiteContext):
        asked.append((context.object, task.label))
        if len(asked) == 6:
            context.stop.request("SIGTERM")
        return real(model, task, protocol, max_len, context)

    monkeypatch.setattr(core8, "evaluate_task", stopping)
    assert job.run() == EXIT_INTERRUPTED
    assert not (job.root / "output" / "payload").exists()
    assert job.status() == "interrupted\n"
    assert job.run() == EXIT_DONE
    assert asked[:6] + asked[7:] == list(dict.fromkeys(asked))
    assert asked[5] == asked[6]
    assert len(set(asked)) == 8
    assert job.payload() == straight.payload()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda job: job.content["provenance"].update(git_sha="unknown"), "is no commit of 40 hex digits"),
        (
            lambda job: job.checkpoint("donor", geometry={"num_hidden_layers": 28}),
            "num_hidden_layers: 2 found, 28 expected",
        ),
        (
            lambda job: job.content["recipe"].update(max_len=4096),
            "more than the 2048 tokens that changed can read",
        ),
        (lambda job: job.content["inputs"].pop("core8_bundle"), "core8_bundle is missing; the core8 suite"),
        (lambda job: job.content["recipe"]["checkpoints"].pop("changed"), "changed hold weights, but"),
    ],
)
def test_what_does_not_fit_is_refused(change, message, make):
    job = make("job", "donor", "changed")
    change(job)
    assert job.run() == EXIT_FAILED
    assert message in job.status()
    assert not (job.root / "output" / "payload").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda job: job.content["inputs"].pop("donor"),
            "inputs.donor: missing; recipe.checkpoints names it",
        ),
        (lambda job: job.content["execution"].update(nproc=2, dp=2), "execution.nproc = 2"),
        (lambda job: job.content["recipe"].pop("core8"), "suites has 'core8'"),
        (lambda job: job.checkpoint("donor", compare_to="donor"), "compared with each other in a circle"),
        (lambda job: job.content["recipe"].update(suite=[]), "nearest valid key is 'suites'"),
    ],
)
def test_a_malformed_job_is_refused_when_it_is_read(change, message, make, capsys):
    job = make("job", "donor")
    change(job)
    assert job.run() == EXIT_FAILED
    assert message in capsys.readouterr().err


def test_an_architecture_that_differs_from_the_checkpoints_is_refused(make):
    job = make("job", "student")
    job.checkpoint("student", architecture=plain(architecture(layers=8)))
    assert job.run() == EXIT_FAILED
    assert "model.num_layers: 4 stored, 8 asked" in job.status()
