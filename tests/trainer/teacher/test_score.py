"""The `score` command: what it stores, and that neither kills nor sharing out change a byte."""

import fcntl
import json
from pathlib import Path

import numpy as np
import pytest

from tests.trainer.metric_rows import read_metrics
from tests.trainer.teacher.rendered import write_rendered
from tests.trainer.teacher.serving import MODEL, Served, serving
from tests.trainer.train.train_jobs import VOCAB, tiny_recipe, write_conversations
from trainer.__main__ import main
from trainer.checkpoints.published import save_published
from trainer.contract.schema.architecture import Architecture
from trainer.contract.schema.base import parse
from trainer.contract.status import EXIT_DONE, EXIT_FAILED, EXIT_INTERRUPTED
from trainer.contract.topk import writer
from trainer.contract.topk.store import TopKStore
from trainer.contract.topk.subset import scored_sequence
from trainer.data.indexed import SpanDocuments
from trainer.job.distributed import session
from trainer.job.signals import StopRequest
from trainer.model.gpt import build_model
from trainer.teacher import scope
from trainer.teacher.modes import ModeWriter
from trainer.teacher.opening import open_teacher
from trainer.teacher.shards import draw_key
from trainer.teacher.teacher import TailDraws

FRACTION = 0.5
TERMS = {"--topk": 6, "--tail-draws": 2, "--subset-fraction": FRACTION, "--logprob-error": 0.01}


class Killed(BaseException):
    """A process that is no more."""


@pytest.fixture(scope="module", autouse=True)
def small_pieces():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scope, "PIECE_TOKENS", 150)
        patch.setattr(writer, "BLOCK_TOKENS", 60)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_conversations(tmp_path_factory.mktemp("synth_kd_v1"), rows=28, valid=6)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    architecture = parse(Architecture, tiny_recipe()["architecture"])
    directory = tmp_path_factory.mktemp("teacher") / "payload"
    with session("cpu"):
        save_published(build_model(architecture, seed=5), architecture, directory)
    return directory


def score(teacher, data, output, *more, **changes) -> int:
    terms = TERMS | {f"--{key.replace('_', '-')}": value for key, value in changes.items()}
    flags = [str(part) for pair in terms.items() for part in pair]
    paths = ["--teacher", str(teacher), "--data", str(data), "--output", str(output)]
    return main(["score", *paths, *flags, *map(str, more)])


def content(root: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(root)): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()
    }


@pytest.fixture(scope="module")
def whole(teacher, data, tmp_path_factory) -> Path:
    """A store that nothing disturbed."""
    output = tmp_path_factory.mktemp("whole")
    assert score(teacher, data, output) == EXIT_DONE
    return output


def test_the_store_holds_what_the_teacher_says_of_every_supervised_token(whole, teacher, data):
    store = TopKStore(whole / "payload")
    store.verify()
    with session("cpu"):
        means = compared(store, data, open_teacher(teacher, digest="-"))
    assert store.manifest["span_means"] == pytest.approx(means, abs=0.01)
    assert store.manifest["teacher"] == {
        "kind": "checkpoint",
        "digest": store.manifest["teacher"]["digest"],
        "dtype": "float32",
        "reasoning_mode": "high",
    }


def compared(store, data, asked) -> dict[str, float]:
    """Hold every record to the teacher itself; the mean log-probability of a label in training, by span."""
    labels: dict[int, list[float]] = {1: [], 2: []}
    for split in ("train", "valid"):
        documents = SpanDocuments(data, split)
        for number in range(len(documents)):
            shard, sequence = divmod(number, len(documents) // 2)
            tokens, mask, span = documents[number]
            due = split == "valid" or scored_sequence(tokens, FRACTION)
            assert (sequence in store.sequences(split, shard)) == due
            if not due:
                continue
            wanted = np.flatnonzero(mask)
            key = draw_key(1234, scope.Place(split, shard, 0, 0), sequence)
            said = asked.score([tokens.tolist()], [wanted.tolist()], 6, tail=TailDraws(2, [key]))[0]
            stored = store.read(split, shard, sequence)
            np.testing.assert_allclose(stored.label_logprob, said.label_logprob, atol=0.01)
            np.testing.assert_allclose(stored.logprobs, said.logprobs, atol=0.01)
            assert np.array_equal(stored.ids, said.ids)
            assert np.array_equal(stored.draws, said.draws)
            if split == "train":
                for label, which in zip(said.label_logprob, span[wanted], strict=True):
                    labels[int(which)].append(float(label))
    return {"reasoning": float(np.mean(labels[1])), "final": float(np.mean(labels[2]))}


def test_the_summary_says_how_much_and_how_well(whole):
    summary = json.loads((whole / "summary.json").read_text())
    store = TopKStore(whole / "payload")
    metrics = summary["metrics"]
    for split in ("train", "valid"):
        assert metrics[f"{split}/tokens"] == store.manifest["splits"][split]["tokens"]
    assert metrics["valid/coverage"] == 1.0
    assert 0.2 < metrics["train/coverage"] < 0.8
    assert metrics["ids"] == 6.0
    assert 0 < metrics["tail_mass"] < 1
    assert summary["self_test"]["repeated"] <= 1e-4 < summary["self_test"]["signal"]
    lines = read_metrics(whole / "work" / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    assert sum(line["tokens"] for line in lines) == metrics["train/tokens"] + metrics["valid/tokens"]
    assert (whole / "work" / "STATUS").read_text() == "done\n"


@pytest.mark.parametrize("place", [1, 4])
def test_a_kill_in_the_middle_of_a_write_changes_no_byte(place, whole, teacher, data, tmp_path, monkeypatch):
    write = writer.TopKShardWriter._write
    calls = 0

    def killed(self, what):
        nonlocal calls
        calls += 1
        if calls == place + 1:
            write(self, what[: len(what) // 2])
            raise Killed
        write(self, what)

    with monkeypatch.context() as patch:
        patch.setattr(writer.TopKShardWriter, "_write", killed)
        assert score(teacher, data, tmp_path) == EXIT_FAILED
    assert not (tmp_path / "payload").exists()
    assert score(teacher, data, tmp_path) == EXIT_DONE
    assert content(tmp_path / "payload") == content(whole / "payload")
    steps = [line["step"] for line in read_metrics(tmp_path / "work" / "metrics.jsonl")]
    assert steps == sorted(set(steps))


@pytest.mark.parametrize("processes", [3])
def test_processes_share_the_work_and_the_last_one_delivers(processes, whole, teacher, data, tmp_path):
    for number in reversed(range(processes)):
        assert score(teacher, data, tmp_path, "--shard", number, "--of", processes) == EXIT_DONE
        assert (tmp_path / "work" / "workers" / str(number) / "STATUS").read_text() == "done\n"
    assert not (tmp_path / "payload").exists()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("trainer.teacher.score.open_teacher", None)  # there is nothing to ask any more
        assert score(teacher, data, tmp_path) == EXIT_DONE
    assert content(tmp_path / "payload") == content(whole / "payload")


def test_a_stop_keeps_what_is_made_and_the_same_command_goes_on(whole, teacher, data, tmp_path, monkeypatch):
    asked = 0

    def third_time(self):
        nonlocal asked
        asked += 1
        self.received = "SIGTERM" if asked == 3 else None
        return asked == 3

    with monkeypatch.context() as patch:
        patch.setattr(StopRequest, "__bool__", third_time)
        assert score(teacher, data, tmp_path) == EXIT_INTERRUPTED
    assert score(teacher, data, tmp_path) == EXIT_DONE
    assert content(tmp_path / "payload") == content(whole / "payload")
    assert score(teacher, data, tmp_path) == EXIT_DONE  # once more: it is all there


def failure(output: Path, capsys) -> str:
    status = output / "work" / "STATUS"
    return (status.read_text() if status.is_file() else "") + capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "more", "says"),
    [
        ({"topk": 500}, (), "topk = 500: expected a number from 1 to 256"),
        ({"subset_fraction": 1e-9}, (), "no scored training token in the span reasoning, final"),
        ({"reasoning_mode": "low"}, (), "inputs.o200k_tokenizer: missing"),
        ({}, ("--shard", 0), "--shard and --of go together"),
        ({}, ("--shard", 2, "--of", 2), "shards are 0 to 1"),
        ({"mass": 2.0}, (), "recipe: mass"),
    ],
)
def test_what_cannot_be_scored_is_refused(changes, more, says, teacher, data, tmp_path, capsys):
    assert score(teacher, data, tmp_path, *more, **changes) == EXIT_FAILED
    assert says in failure(tmp_path, capsys)
    assert not (tmp_path / "payload").exists()


def test_a_teacher_with_another_vocabulary_is_refused(teacher, tmp_path, capsys):
    data = write_conversations(tmp_path / "data", rows=4, valid=4, vocab=VOCAB + 8)
    assert score(teacher, data, tmp_path) == EXIT_FAILED
    assert "the teacher has 256 token ids, the data have 264" in failure(tmp_path, capsys)


def test_a_teacher_of_another_tokenizer_is_refused(llama_dir, data, tmp_path, capsys):
    assert score(llama_dir, data, tmp_path) == EXIT_FAILED
    assert "its log-probabilities are of other tokens" in failure(tmp_path, capsys)


def test_a_shard_that_another_process_makes_is_left_alone(teacher, data, tmp_path, capsys):
    lock = tmp_path / "work" / "shards" / "train" / "shard_01.lock"
    lock.parent.mkdir(parents=True)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert score(teacher, data, tmp_path) == EXIT_FAILED
        assert "train/shard_01 is being scored by another process" in failure(tmp_path, capsys)
    assert score(teacher, data, tmp_path) == EXIT_DONE


def test_another_store_in_the_output_directory_is_refused(whole, teacher, data, capsys):
    before = content(whole / "payload")
    assert score(teacher, data, whole, topk=5) == EXIT_FAILED
    assert "holds another store" in failure(whole, capsys)
    assert content(whole / "payload") == before


def test_damage_in_the_data_ends_the_job(teacher, tmp_path, capsys):
    data = write_conversations(tmp_path / "data", rows=4, valid=4)
    path = data / "train" / "shard_00_tokens.bin"
    path.write_bytes(path.read_bytes()[:-4])
    assert score(teacher, data, tmp_path) == EXIT_FAILED
    assert "truncated" in failure(tmp_path, capsys)


@pytest.fixture
def described(tmp_path) -> Path:
    """The description of a served teacher."""
    (tmp_path / "teacher").mkdir()
    said = {
        "schema": "vpmoe.teacher/1",
        "kind": "server",
        "reasoning_mode": "high",
        "tokenizer_sha256": "0" * 64,
    }
    text = json.dumps(said | {"model": MODEL, "revision": "1a2b"})
    (tmp_path / "teacher" / "teacher.json").write_text(text)
    return tmp_path / "teacher"


class Swapped(Served):
    """Has other weights for one request, the first after a self-test."""

    def logprobs(self, tokens: list[int]) -> np.ndarray:
        self.shift = 3.0 if len(self.requests) == 7 else 0.0
        return super().logprobs(tokens)


def test_what_a_teacher_contradicts_later_does_not_stay_in_the_store(
    llama, described, tmp_path, monkeypatch, capsys
):
    data = write_conversations(tmp_path / "data", rows=4, valid=2, vocab=llama.vocab_size)
    terms = {"subset_fraction": 1.0, "tail_draws": 0}
    for output, served in ("good", Served(llama.model.module)), ("bad", Swapped(llama.model.module)):
        with serving(served):
            monkeypatch.setenv("VPMOE_TEACHER_URL", served.url)
            if output == "bad":
                assert score(described, data, tmp_path / output, **terms) == EXIT_FAILED
                said = failure(tmp_path / output, capsys)
                assert "train/shard_00: the teacher answered, and now answers the same tokens with" in said
                assert "The shard is removed: start again, and it is scored anew" in said
            assert score(described, data, tmp_path / output, **terms) == EXIT_DONE
    assert content(tmp_path / "bad" / "payload") == content(tmp_path / "good" / "payload")


def test_a_served_teacher_makes_a_store_without_draws(llama, described, tmp_path, monkeypatch, capsys):
    data = write_conversations(tmp_path / "data", rows=4, valid=2, vocab=llama.vocab_size)
    with serving(Served(llama.model.module)) as served:
        monkeypatch.setenv("VPMOE_TEACHER_URL", served.url)
        terms = {"subset_fraction": 1.0}
        assert score(described, data, tmp_path / "drawn", **terms) == EXIT_FAILED
        assert "tail_draws = 2: a server gives its likeliest tokens" in failure(tmp_path / "drawn", capsys)
        other = {"reasoning_mode": "low", "stored_mode": "low"}
        assert score(described, data, tmp_path / "low", **other) == EXIT_FAILED
        assert "teacher.json of the teacher says 'high'" in failure(tmp_path / "low", capsys)
        assert score(described, data, tmp_path / "made", tail_draws=0, **terms) == EXIT_DONE
    store = TopKStore(tmp_path / "made" / "payload")
    assert store.manifest["teacher"] == {
        "kind": "server",
        "model": MODEL,
        "revision": "1a2b",
        "reasoning_mode": "high",
    }
    documents = SpanDocuments(data, "valid")
    tokens, mask, _ = documents[0]
    said = llama.score([tokens.tolist()], [np.flatnonzero(mask).tolist()], 6)[0]
    np.testing.assert_allclose(store.read("valid", 0, 0).logprobs, said.logprobs, atol=0.01)


def test_another_mode_is_asked_for_in_the_stored_conversations_words(
    student_dir, ranks, o200k, tmp_path, capsys
):
    data = write_rendered(tmp_path / "data", ranks)
    terms = {"reasoning_mode": "low", "subset_fraction": 1.0}
    wrong = terms | {"stored_mode": "medium"}
    assert score(student_dir, data, tmp_path / "wrong", "--tokenizer", ranks, **wrong) == EXIT_FAILED
    assert "the stored conversations say 'high'" in failure(tmp_path / "wrong", capsys)
    assert score(student_dir, data, tmp_path / "out", "--tokenizer", ranks, **terms) == EXIT_DONE
    store = TopKStore(tmp_path / "out" / "payload")
    assert store.manifest["teacher"]["reasoning_mode"] == "low"
    tokens, mask, _ = SpanDocuments(data, "train")[0]
    other = ModeWriter(o200k).rewrite(tokens, "low")
    assert not np.array_equal(other.tokens, tokens)
    wanted = other.positions(np.flatnonzero(mask)).tolist()
    with session("cpu"):
        said = open_teacher(student_dir, digest="-").score([other.tokens.tolist()], [wanted], 6)[0]
    stored = store.read("train", 0, 0)
    np.testing.assert_allclose(stored.label_logprob, said.label_logprob, atol=0.01)
    np.testing.assert_allclose(stored.logprobs, said.logprobs, atol=0.01)
