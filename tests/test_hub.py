"""Pinned downloads, from an in-memory hub that breaks off and from an HTTP server on this machine."""

import hashlib
import http.server
import json
import threading
from types import SimpleNamespace

import pytest

from vpmoe_assets.hub import (
    HubError,
    HubFile,
    HuggingFaceHub,
    fetch,
    require_commit,
    select_files,
)
from vpmoe_assets.synth import fetch_synth

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = bytes(range(256)) * 40


def sha(content):
    return hashlib.sha256(content).hexdigest()


class FakeHub:
    """Serves bytes in small pieces; ``break_after`` bytes the connection is lost, once."""

    def __init__(self, files, break_after=None):
        self.files = files
        self.break_after = break_after
        self.offsets = []

    def list_files(self, repo, repo_type, revision):
        return [HubFile(path, len(content), sha(content)) for path, content in self.files.items()]

    def read(self, repo, repo_type, revision, path, offset):
        self.offsets.append(offset)
        content = self.files[path][offset:]
        for start in range(0, len(content), 1000):
            if self.break_after is not None and start >= self.break_after:
                self.break_after = None
                raise HubError("connection lost")
            yield content[start : start + 1000]


FILE = HubFile("data/a.parquet", len(CONTENT), sha(CONTENT))


def get(hub, directory, file=FILE, **more):
    return fetch(hub, "owner/name", "dataset", COMMIT, file, directory, **more)


def test_a_broken_download_goes_on_where_it_stopped(tmp_path):
    hub = FakeHub({"data/a.parquet": CONTENT}, break_after=4000)
    with pytest.raises(HubError, match="connection lost"):
        get(hub, tmp_path)
    assert not (tmp_path / "data/a.parquet").exists()
    seen = []
    path = get(hub, tmp_path, progress=seen.append)
    assert path.read_bytes() == CONTENT
    assert hub.offsets == [0, 4000]
    assert seen[0] == 4000
    assert sum(seen) == len(CONTENT)
    assert [p.name for p in path.parent.iterdir()] == ["a.parquet"]


def test_a_file_that_is_here_already_is_not_fetched_again(tmp_path):
    hub = FakeHub({"data/a.parquet": CONTENT})
    get(hub, tmp_path)
    get(hub, tmp_path)
    assert hub.offsets == [0]


def test_a_damaged_local_file_is_fetched_again(tmp_path):
    hub = FakeHub({"data/a.parquet": CONTENT})
    path = get(hub, tmp_path)
    path.write_bytes(CONTENT[:-1] + b"x")
    assert get(hub, tmp_path).read_bytes() == CONTENT


def test_a_silently_short_answer_keeps_what_came_and_says_so(tmp_path):
    class Short(FakeHub):
        def read(self, *arguments):
            yield next(super().read(*arguments))

    hub = Short({"data/a.parquet": CONTENT})
    with pytest.raises(HubError, match="ended after 1000 of 10240 bytes"):
        get(hub, tmp_path)
    assert get(FakeHub({"data/a.parquet": CONTENT}), tmp_path).read_bytes() == CONTENT


def test_wrong_bytes_are_refused_and_not_kept(tmp_path):
    hub = FakeHub({"data/a.parquet": b"y" * len(CONTENT)})
    with pytest.raises(HubError, match=f"expected 10240 bytes with {sha(CONTENT)}"):
        get(hub, tmp_path)
    assert not [p for p in tmp_path.rglob("*") if p.is_file()]


def test_the_rest_of_another_commits_download_is_never_continued(tmp_path):
    hub = FakeHub({"data/a.parquet": b"y" * len(CONTENT)}, break_after=2000)
    with pytest.raises(HubError):
        get(hub, tmp_path, HubFile("data/a.parquet", len(CONTENT), sha(b"y" * len(CONTENT))))
    hub = FakeHub({"data/a.parquet": CONTENT})
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.offsets == [0]


def test_a_path_that_leaves_the_download_directory_is_refused(tmp_path):
    with pytest.raises(HubError, match="leaves the download directory"):
        get(FakeHub({}), tmp_path / "in", HubFile("../out.parquet", 1, sha(b"x")))


LISTING = [
    HubFile("b.parquet", 2, sha(b"b")),
    HubFile("a.parquet", 2, sha(b"a")),
    HubFile("README.md", 9, None),
]


def test_without_pins_every_matching_file_is_taken_in_order_with_the_commits_digest():
    assert [file.path for file in select_files(LISTING, {})] == ["a.parquet", "b.parquet"]


def test_pins_choose_files_and_must_agree_with_the_commit():
    assert select_files(LISTING, {"b.parquet": sha(b"b")}) == [LISTING[0]]
    assert select_files(LISTING, {"README.md": sha(b"r")}) == [HubFile("README.md", 9, sha(b"r"))]
    with pytest.raises(HubError, match="the commit names"):
        select_files(LISTING, {"b.parquet": sha(b"z")})
    with pytest.raises(HubError, match="no such file"):
        select_files(LISTING, {"c.parquet": sha(b"z")})
    with pytest.raises(HubError, match="names no sha256"):
        select_files(LISTING, {"README.md": ""})
    with pytest.raises(HubError, match="no file of the commit matches"):
        select_files(LISTING, {}, pattern="*.jsonl")


@pytest.mark.parametrize("revision", ["", "main", "0123abc", COMMIT.upper()])
def test_a_revision_that_is_no_commit_is_refused_naming_its_key(revision):
    with pytest.raises(HubError, match=r"sources\.synth\.revision"):
        require_commit("owner/name", revision, "sources.synth.revision")


def synth_source(**more):
    return SimpleNamespace(**{"repo": "PleIAs/SYNTH", "revision": COMMIT, "files": {}, **more})


def test_synth_files_of_a_commit_are_fetched_and_listed(tmp_path):
    hub = FakeHub({"b.parquet": b"bb", "a.parquet": b"a", "README.md": b"?"})
    manifest = fetch_synth(synth_source(), tmp_path, client=hub)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.parquet", "b.parquet"]
    assert manifest["revision"] == COMMIT
    assert manifest["storage"]["shards"] == [
        {"path": "a.parquet", "bytes": 1, "sha256": sha(b"a")},
        {"path": "b.parquet", "bytes": 2, "sha256": sha(b"bb")},
    ]


def test_an_unpinned_synth_source_is_refused_before_the_hub_is_asked(tmp_path):
    with pytest.raises(HubError, match=r"sources\.synth\.revision = ''"):
        fetch_synth(synth_source(revision=""), tmp_path, client=None)


class Handler(http.server.BaseHTTPRequestHandler):
    """The two addresses that the client asks: the listing of a commit, and a file, from an offset if told."""

    ranges: bool = True

    def do_GET(self):
        if "/tree/" in self.path:
            entry = {
                "type": "file",
                "path": "data/a.parquet",
                "size": len(CONTENT),
                "oid": "0" * 40,
                "lfs": {"oid": sha(CONTENT), "size": len(CONTENT), "pointerSize": 100},
            }
            small = {"type": "file", "path": "README.md", "size": 3, "oid": "1" * 40}
            folder = {"type": "directory", "path": "data", "oid": "2" * 40}
            return self.answer(200, json.dumps([folder, small, entry]).encode(), "application/json")
        if self.path != f"/datasets/owner/name/resolve/{COMMIT}/data/a.parquet":
            return self.answer(404, b"", "text/plain")
        offset = self.headers.get("Range")
        if offset and self.ranges:
            start = int(offset.removeprefix("bytes=").removesuffix("-"))
            return self.answer(206, CONTENT[start:], "application/octet-stream")
        return self.answer(200, CONTENT, "application/octet-stream")

    def answer(self, status, body, kind):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Be quiet."""


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    handler = type("Handler", (Handler,), {})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield running
        running.shutdown()


def test_the_real_client_lists_and_resumes_over_http(server, tmp_path):
    hub = HuggingFaceHub(f"http://127.0.0.1:{server.server_port}")
    listing = hub.list_files("owner/name", "dataset", COMMIT)
    assert listing == [HubFile("README.md", 3, None, "1" * 40), FILE]
    partial = tmp_path / "data" / f".a.parquet.{FILE.sha256}.part"
    partial.parent.mkdir()
    partial.write_bytes(CONTENT[:777])
    assert get(hub, tmp_path).read_bytes() == CONTENT
    server.RequestHandlerClass.ranges = False
    partial.write_bytes(CONTENT[:777])
    (tmp_path / "data/a.parquet").unlink()
    with pytest.raises(HubError, match="from the start"):
        get(hub, tmp_path)


def test_a_small_file_is_accepted_by_its_git_id(tmp_path):
    content = b"hello\n"
    hub = FakeHub({"a.json": content})
    # What `git hash-object` prints for these bytes.
    known = HubFile("a.json", len(content), None, "ce013625030ba8dba906f756967f9e9ca394464a")
    assert get(hub, tmp_path, known).read_bytes() == content
    other = HubFile("b.json", len(content), None, "ce013625030ba8dba906f756967f9e9ca394464b")
    hub.files["b.json"] = content
    with pytest.raises(HubError, match=r"with git id ce0136.*expected 6 bytes with ce0136"):
        get(hub, tmp_path, other)
    with pytest.raises(HubError, match="names no digest"):
        get(hub, tmp_path, HubFile("b.json", len(content), None))


def test_a_missing_file_and_an_unreachable_hub_are_told_apart(server, monkeypatch):
    monkeypatch.setattr(
        "huggingface_hub.utils._http.time.sleep", lambda _: None
    )  # its patience is not the subject
    port = server.server_port
    hub = HuggingFaceHub(f"http://127.0.0.1:{port}")
    with pytest.raises(HubError, match="404"):
        list(hub.read("owner/name", "dataset", COMMIT, "absent.parquet", 0))
    # Port 9 (discard) of this machine: nothing listens there.
    nowhere = HuggingFaceHub("http://127.0.0.1:9")
    with pytest.raises(HubError, match=r"cannot be reached.*needs a network"):
        nowhere.list_files("owner/name", "dataset", COMMIT)
    with pytest.raises(HubError, match="cannot be reached"):
        list(nowhere.read("owner/name", "dataset", COMMIT, "a.parquet", 0))
