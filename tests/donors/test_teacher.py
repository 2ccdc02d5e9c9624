"""Teachers from outside: fetched whole, described without an address, and asked whether they are there."""

import json
import shutil
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from tests.donors.test_download import COMMIT, FakeHub, sha
from trainer.contract.schema.base import ConfigError
from trainer.contract.schema.sources import HubTeacher, ServerTeacher
from trainer.teacher.descriptor import read_descriptor
from vpmoe_assets.donors import teacher
from vpmoe_assets.donors.download import fetch_teacher
from vpmoe_assets.errors import DonorError

RANKS = "a" * 64
SERVED = ServerTeacher(
    kind="server", model="gpt-oss", revision=COMMIT, reasoning_mode="high", url_env="MY_TEACHER"
)


def published(files: dict[str, str], revision: str = COMMIT) -> HubTeacher:
    return HubTeacher(
        kind="hub", repo="openai/gpt-oss-120b", revision=revision, files=files, reasoning_mode="high"
    )


@contextmanager
def server(status: int, body: bytes) -> Iterator[str]:
    class Answer(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Answer) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def test_a_published_teacher_is_fetched_whole_and_without_what_lies_deeper(tmp_path):
    files = {
        "config.json": b"{}",
        "tokenizer.json": b"[]",
        "model-00001-of-00002.safetensors": b"one",
        "model-00002-of-00002.safetensors": b"two",
        "original/model.safetensors": b"the same again",
        "README.md": b"not taken",
    }
    manifest = fetch_teacher(published({"config.json": sha(b"{}")}), tmp_path, client=FakeHub(files))
    taken = sorted(name for name in files if "/" not in name and name != "README.md")
    assert sorted(path.name for path in tmp_path.iterdir()) == taken
    assert teacher.revision_faults(published({}), manifest) == []
    other = published({}).model_copy(update={"revision": "f" * 40})
    assert teacher.revision_faults(other, manifest) == [
        f"revision is {COMMIT!r}, the experiment says {'f' * 40!r}"
    ]


def test_a_teacher_that_is_not_pinned_is_refused_at_use(tmp_path):
    with pytest.raises(ConfigError, match=r"sources\.teacher\.revision.*: not pinned"):
        fetch_teacher(published({}, revision=""), tmp_path, client=FakeHub({}))


def test_the_published_vocabulary_is_the_students_or_the_fault_is_named(gpt_oss: Path, ranks, tmp_path):
    copy = Path(shutil.copytree(gpt_oss, tmp_path / "copy"))
    assert teacher.vocabulary_faults(201_088, ranks, copy) == []
    assert teacher.vocabulary_faults(200_000, ranks, copy) == [
        "config.json: vocab_size is 201088, the student's is 200000"
    ]
    (copy / "tokenizer.json").write_text("{}")
    (fault,) = teacher.vocabulary_faults(201_088, ranks, copy)
    assert fault.startswith("tokenizer.json: sha256 ")


def test_a_descriptor_says_who_and_never_where_and_the_trainer_reads_it(tmp_path):
    teacher.write_descriptor(SERVED, RANKS, tmp_path)
    found = read_descriptor(tmp_path / "teacher.json")
    assert (found.model, found.revision, found.reasoning_mode) == ("gpt-oss", COMMIT, "high")
    assert found.tokenizer_sha256 == RANKS
    assert SERVED.url_env not in (tmp_path / "teacher.json").read_text()
    assert teacher.descriptor_faults(SERVED, RANKS, tmp_path) == []
    (fault,) = teacher.descriptor_faults(SERVED, "b" * 64, tmp_path)
    assert fault == f"teacher.json: tokenizer_sha256 is {RANKS!r}, expected {'b' * 64!r}"


def test_a_job_is_told_which_variable_holds_the_addresses(monkeypatch):
    monkeypatch.delenv("MY_TEACHER", raising=False)
    with pytest.raises(DonorError, match="environment variable MY_TEACHER is not set"):
        teacher.where(SERVED)
    monkeypatch.setenv("MY_TEACHER", "http://a:1/v1/, http://b:2/v1")
    assert teacher.where(SERVED) == {"teacher_url_env": "MY_TEACHER"}
    assert teacher.addresses("MY_TEACHER") == ["http://a:1/v1", "http://b:2/v1"]
    assert teacher.where(published({})) == {}


def test_replicas_that_are_silent_broken_or_serve_another_model_are_named():
    models = json.dumps({"data": [{"id": "gpt-oss"}]}).encode()
    with server(200, models) as good, server(500, b"") as broken, server(200, b"<html>") as page:
        assert teacher.silent([good, f"{good}/v1"], "gpt-oss") == []
        (other,) = teacher.silent([good], "gpt-oss-120b")
        assert other == f"{good}/v1/models: serves gpt-oss, not gpt-oss-120b"
        faults = teacher.silent([broken, page, "http://127.0.0.1:1"], "gpt-oss")
    assert [fault.split(": ")[1] for fault in faults] == [
        "HTTPStatusError",
        "JSONDecodeError",
        "ConnectError",
    ]
