"""Whole evaluation jobs: reports, resuming, checkpoints that fail, and what is refused before any work."""

import json
import multiprocessing
import os
import re
import signal
import time
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
from trainer.contract.attempts import read_attempts
from trainer.contract.schema.base import plain
from trainer.contract.status import ATTEMPTS_NAME, EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
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

    def output(self, name: str) -> Path:
        return self.root / "output" / name

    def payload(self, *names: str) -> dict[str, bytes]:
        return {
            path.name: path.read_bytes()
            for name in names or self.content["recipe"]["checkpoints"]
            for path in sorted((self.output(name) / "payload").iterdir())
        }

    def report(self, name: str) -> dict[str, Any]:
        return json.loads((self.output(name) / "payload" / f"{name}.json").read_text())

    def envelope(self, name: str) -> dict[str, Any]:
        return json.loads((self.output(name) / f"{name}.json").read_text())

    def attempts(self, name: str) -> list[str]:
        return [each.ended or "open" for each in read_attempts(self.root / "work" / name / ATTEMPTS_NAME)]

    def summary(self) -> dict[str, Any]:
        return json.loads((self.root / "output" / "summary.json").read_text())

    def status(self) -> str:
        return (self.root / "work" / "STATUS").read_text()


@pytest.fixture
def make(tmp_path, inputs):
    return lambda name, *objects, **more: EvaluationJob(tmp_path / name, inputs, *objects, **more)


def test_checkpoints_of_both_kinds_are_measured_in_one_process(make):
    job = make("job", "changed", "donor", "student", suites=("core8", "ppl"))
    assert job.run("--batch-rows", "3") == EXIT_DONE
    donor, changed, student = (job.report(name) for name in ("donor", "changed", "student"))
    for report in (donor, changed, student):
        assert report["schema_version"] == "vpmoe.eval/1"
        assert report["results"].keys() == report["stderr"]["tasks"].keys() == report["counts"].keys()
        assert (report["max_len"], report["dtype"]) == (512, "fp32")
        assert report["config"]["bundle_digest"] == "digest of core8_bundle"
    assert "another tokenizer" in donor["refused"]["ppl"]
    assert "ppl" not in donor["suites"]
    assert not student["refused"]
    assert student["suites"]["ppl"]["healing_text_v1"]["tokens"] == 48
    assert [layer["layer"] for layer in student["suites"]["router"]["layers"]] == [2, 3, 4]
    assert student["tokenizer_sha256"] != donor["tokenizer_sha256"] == changed["tokenizer_sha256"]

    summary = job.summary()
    assert list(summary["objects"]) == ["changed", "donor", "student"]
    student_alone = json.loads((job.output("student") / "summary.json").read_text())
    assert summary["objects"]["student"]["metrics"] == student["metrics"] == student_alone["metrics"]
    assert student_alone["seconds"].keys() == {"core8", "ppl", "router"}
    assert summary["batching"]["rows"] == 3
    assert job.attempts("student") == ["done"]
    assert "student: router in" in (job.root / "work" / "student" / "log.txt").read_text()
    assert "donor" not in (job.root / "work" / "student" / "log.txt").read_text()
    lines = [json.loads(line) for line in (job.root / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert job.status() == "done\n"


def test_a_payload_is_the_same_bytes_again_and_its_envelope_names_commit_and_time(make):
    first, second = make("first", "student", suites=("core8", "ppl")), make("second", "student")
    second.content["recipe"]["suites"] = ["core8", "ppl"]
    second.content["provenance"]["git_sha"] = "f" * 40
    second.content["experiment"] = "another"
    assert (first.run(), second.run()) == (EXIT_DONE, EXIT_DONE)
    assert first.payload() == second.payload()
    for text in first.payload().values():
        assert COMMIT.encode() not in text
        assert str(first.root).encode() not in text
        assert b"smoke" not in text
    envelope = first.envelope("student")
    assert envelope["git_sha"] == COMMIT
    assert envelope["created_utc"].startswith("20")
    assert len(envelope["checkpoint_provenance_sha256"]) == 64
    content = first.report("student")
    assert {key: envelope[key] for key in content} == content


def test_a_report_does_not_depend_on_what_else_is_measured(make):
    together, alone = make("together", "donor", "changed"), make("alone", "changed")
    assert (together.run(), alone.run()) == (EXIT_DONE, EXIT_DONE)
    assert together.payload("changed") == alone.payload()


def test_checkpoints_measured_beside_each_other_get_the_same_bytes(make):
    names = ("donor", "student", "changed")
    beside, straight = (make(name, *names, suites=("core8", "ppl")) for name in ("beside", "straight"))
    assert (beside.run("--processes", "2"), straight.run("--processes", "1")) == (EXIT_DONE, EXIT_DONE)
    assert beside.payload() == straight.payload()
    assert sorted(beside.summary()["objects"]) == sorted(names)
    assert [beside.attempts(name) for name in names] == [["done"]] * 3
    lines = [json.loads(line) for line in (beside.root / "work" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5]
    assert "donor" not in (beside.root / "work" / "student" / "log.txt").read_text()


def test_one_that_fails_beside_others_keeps_none_from_being_measured(make):
    job = make("job", "donor", "changed")
    job.checkpoint("donor", geometry={"num_hidden_layers": 28})
    assert job.run("--processes", "2") == EXIT_FAILED
    assert job.status().startswith("failed: EvaluationError: donor: ")
    assert (job.output("changed") / "summary.json").is_file()


def test_a_process_that_is_killed_ends_the_job_with_its_name(make, monkeypatch):
    job = make("job", "donor", "changed")
    real = core8.evaluate_task

    def killed(model, task, protocol, max_len, context: SuiteContext):
        if context.object == "donor":
            os.kill(os.getpid(), signal.SIGKILL)
        return real(model, task, protocol, max_len, context)

    monkeypatch.setattr(core8, "evaluate_task", killed)
    assert job.run("--processes", "2") == EXIT_FAILED
    assert re.search(r"failed: JobError: measure_\d, .* was ended by signal 9", job.status())
    assert multiprocessing.active_children() == []


def test_a_stop_reaches_those_who_measure(make, monkeypatch):
    job, straight = make("job", "donor", "changed"), make("straight", "donor", "changed")
    assert straight.run("--processes", "1") == EXIT_DONE
    real, parent = core8.evaluate_task, os.getpid()

    def stopping(model, task, protocol, max_len, context: SuiteContext):
        if (job.root / "work" / context.object / ".tasks").is_dir():  # the second task
            os.kill(parent, signal.SIGTERM)
            while not context.stop:
                time.sleep(0.01)
        return real(model, task, protocol, max_len, context)

    with monkeypatch.context() as patched:
        patched.setattr(core8, "evaluate_task", stopping)
        assert job.run("--processes", "2") == EXIT_INTERRUPTED
    assert job.status() == "interrupted\n"
    assert job.run("--processes", "2") == EXIT_DONE
    assert job.payload() == straight.payload()


def test_several_processes_are_refused_where_one_has_the_device(make):
    job = make("job", "donor", "changed")
    job.content["execution"] |= {"device": "cuda"}
    assert job.run("--processes", "2") == EXIT_FAILED
    assert "measures; leave --processes out" in job.status()


def test_a_checkpoint_that_cannot_be_measured_keeps_no_other_from_it(make):
    job = make("job", "donor", "changed")
    job.checkpoint("donor", geometry={"num_hidden_layers": 28})
    assert job.run() == EXIT_FAILED
    assert job.status().startswith("failed: EvaluationError: donor: ")
    assert job.report("changed")["checkpoint_id"] == "changed"
    assert (job.output("changed") / "summary.json").is_file()
    assert not (job.output("donor") / "summary.json").exists()
    assert not (job.root / "output" / "summary.json").exists()
    (ended,) = job.attempts("donor")
    assert ended.startswith("failed: donor: ")
    assert job.attempts("changed") == ["done"]


def test_a_part_is_delivered_where_the_job_says_under_its_own_fingerprint(make, tmp_path):
    job = make("job", "donor")
    part = {
        "recipe_fingerprint": "e" * 64,
        "work_dir": str(tmp_path / "w"),
        "output_dir": str(tmp_path / "o"),
    }
    job.content["parts"] = {"donor": part}
    assert job.run() == EXIT_DONE
    assert sorted(path.name for path in (tmp_path / "o" / "payload").iterdir()) == [
        "donor.items.jsonl",
        "donor.json",
    ]
    assert json.loads((tmp_path / "o" / "donor.json").read_text())["recipe_fingerprint"] == "e" * 64
    assert any((tmp_path / "w" / ".tasks").iterdir())
    job.content["parts"]["other"] = part
    assert job.run() == EXIT_FAILED


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
    assert (job.output("donor") / "summary.json").exists(), "delivered as soon as it is measured"
    assert not (job.output("changed") / "payload").exists()
    assert job.status() == "interrupted\n"
    assert (job.attempts("donor"), job.attempts("changed")) == (["done"], ["interrupted"])
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
    assert not (job.root / "output" / "summary.json").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda job: job.content["inputs"].pop("donor"),
            "inputs.donor: missing; recipe.checkpoints names it",
        ),
        (lambda job: job.content["execution"].update(nproc=2, dp=2), "execution.nproc = 2"),
        (lambda job: job.content["recipe"].pop("core8"), "suites has 'core8'"),
        (
            lambda job: job.checkpoint("donor", compare_to="changed"),
            "checkpoints.donor.huggingface: unknown key",
        ),
        (
            lambda job: job.content.update(
                parts={"x": {"recipe_fingerprint": "f", "work_dir": "w", "output_dir": "o"}}
            ),
            "parts: x not among recipe.checkpoints, donor",
        ),
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
