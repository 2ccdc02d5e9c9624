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
from vpmoe_assets.network import NetworkError, Patience, TransientError
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

    def read(self, repo, repo_type, revision, file, offset):
        self.offsets.append(offset)
        content = self.files[file.path][offset:]
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


def test_a_silently_short_answer_is_continued(tmp_path):
    class Short(FakeHub):
        def read(self, *arguments):
            yield next(super().read(*arguments))

    waits = []
    hub = Short({"data/a.parquet": CONTENT})
    assert get(hub, tmp_path, patience=Patience(sleep=waits.append)).read_bytes() == CONTENT
    assert hub.offsets == list(range(0, len(CONTENT), 1000))
    assert waits == [1.0] * 10  # every one brought something, so none is the second in a row


def test_a_hub_that_stays_silent_is_given_up_and_what_came_is_kept(tmp_path, caplog):
    class Silent(FakeHub):
        def read(self, *arguments):
            if arguments[-1]:
                raise TransientError("nothing came for 3 s", 7.0)
            yield next(super().read(*arguments))

    waits = []
    patience = Patience(attempts=4, longest_pause=8.0, sleep=waits.append)
    with pytest.raises(
        NetworkError, match="nothing came for 3 s, 4 times in a row; start again, it will go on"
    ):
        get(Silent({"data/a.parquet": CONTENT}), tmp_path, patience=patience)
    assert waits == [1.0, 7.0, 7.0]
    assert "nothing came for 3 s; attempt 4 of 4 in 7 s" in caplog.messages
    hub = FakeHub({"data/a.parquet": CONTENT})
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.offsets == [1000]


@pytest.mark.parametrize("left", [b"<html>sign in</html>", CONTENT + b"more"])
def test_what_is_not_the_files_beginning_costs_one_more_download_and_no_error(tmp_path, left):
    partial = tmp_path / "data" / f".a.parquet.{FILE.sha256}.part"
    partial.parent.mkdir()
    partial.write_bytes(left)
    hub = FakeHub({"data/a.parquet": CONTENT})
    assert get(hub, tmp_path).read_bytes() == CONTENT
    assert hub.offsets[-1] == 0


def test_more_bytes_than_the_file_has_are_refused_at_once_and_removed(tmp_path):
    def endless():
        while True:
            yield CONTENT

    hub = FakeHub({})
    hub.read = lambda *_: endless()
    with pytest.raises(NetworkError, match="more than its 10240 bytes came"):
        get(hub, tmp_path)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


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
    """What the client asks: the listing of a commit, in two pages, and a file, from an offset on if told.

    The server's `faults` say what goes wrong with the next request of a kind.
    """

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        listing = "/tree/" in self.path
        fault, kind = self.server.faults.pop("tree" if listing else "file", ""), "application/json"
        if fault == "silent":
            self.server.released.wait(20)
            return None
        if fault in ("429", "503"):
            return self.answer(int(fault), b'{"error": "busy"}', kind, {"Retry-After": "2"})
        if fault == "page":
            return self.answer(200, b"<html>please sign in</html>", "text/html; charset=utf-8")
        if fault == "list":
            return self.answer(200, b'{"error": "no such thing"}', kind)
        if fault == "gated":
            return self.answer(403, b'{"error": "ask\\nfor access"}', kind, {"X-Error-Code": "GatedRepo"})
        if listing:
            entry = {
                "type": "file",
                "path": "data/a.parquet",
                "size": len(CONTENT),
                "oid": "0" * 40,
                "lfs": {"oid": sha(CONTENT), "size": len(CONTENT), "pointerSize": 100},
            }
            small = {"type": "file", "path": "README.md", "size": 3, "oid": "1" * 40}
            folder = {"type": "directory", "path": "data", "oid": "2" * 40}
            if "page=2" in self.path:
                return self.answer(200, json.dumps([entry]).encode(), kind)
            more = {"Link": f'<http://{self.headers["Host"]}{self.path}&page=2>; rel="next"'}
            return self.answer(200, json.dumps([folder, small]).encode(), kind, more)
        if self.path != f"/datasets/owner/name/resolve/{COMMIT}/data/a.parquet":
            return self.answer(404, b"", "text/plain")
        offset = int((self.headers.get("Range") or "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        self.server.offsets.append(offset)
        if fault == "no ranges":
            offset = 0
        if fault == "another size":
            return self.answer(200, CONTENT[1:], "application/octet-stream")
        content = CONTENT[offset:]
        if fault in ("stall", "cut"):
            self.answer(206 if offset else 200, content[:3000], "application/octet-stream", size=len(content))
            if fault == "stall":
                self.server.released.wait(20)
            self.close_connection = True
            return None
        return self.answer(206 if offset else 200, content, "application/octet-stream")

    def answer(self, status, body, kind, headers=None, size=None):
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Type": kind}.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body) if size is None else size))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        """Be quiet."""


@pytest.fixture(scope="module")
def running():
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def server(running, monkeypatch):
    """The server, with the faults of the next requests, and the offsets at which the file was asked for."""
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    running.faults, running.offsets, running.released = {}, [], threading.Event()
    running.waits = []
    yield running
    running.released.set()


def client(server, **more):
    patience = Patience(attempts=3, sleep=server.waits.append)
    return HuggingFaceHub(f"http://127.0.0.1:{server.server_port}", patience=patience, **more)


def test_the_real_client_lists_and_resumes_over_http(server, tmp_path):
    listing = client(server).list_files("owner/name", "dataset", COMMIT)
    assert listing == [HubFile("README.md", 3, None, "1" * 40), FILE]
    for fault in ("", "no ranges"):
        partial = tmp_path / fault / "data" / f".a.parquet.{FILE.sha256}.part"
        partial.parent.mkdir(parents=True)
        partial.write_bytes(CONTENT[:777])
        server.faults = {"file": fault}
        assert get(client(server), tmp_path / fault).read_bytes() == CONTENT
    assert server.offsets == [777, 777]


@pytest.mark.parametrize(
    ("fault", "waits"), [("stall", [1.0]), ("cut", [1.0]), ("429", [2.0]), ("503", [2.0]), ("silent", [1.0])]
)
def test_a_hub_that_is_silent_or_busy_is_asked_again_and_what_came_is_kept(server, tmp_path, fault, waits):
    hub, patience = client(server, timeout=0.3), Patience(sleep=server.waits.append)
    server.faults = {"file": fault}
    assert get(hub, tmp_path, patience=patience).read_bytes() == CONTENT
    assert server.waits == waits
    assert server.offsets[-1] == (3000 if fault in ("stall", "cut") else 0)
    if fault not in ("stall", "cut"):
        server.waits.clear()
        server.faults = {"tree": fault}
        assert hub.list_files("owner/name", "dataset", COMMIT)[1] == FILE
        assert server.waits == waits


def test_a_hub_that_never_answers_is_given_up_within_its_patience(server):
    hub = client(server, timeout=0.1)

    class Always(dict):
        def pop(self, name, default=""):
            return self.get(name, default)

    server.faults = Always(tree="silent")
    with pytest.raises(
        NetworkError, match=r"nothing came for 0\.1 s .*3 times in a row; this source needs a net"
    ):
        hub.list_files("owner/name", "dataset", COMMIT)
    assert server.waits == [1.0, 2.0]


@pytest.mark.parametrize(
    ("place", "fault", "said"),
    [
        (
            "tree",
            "page",
            r"the answer is no list of files \(text/html; charset=utf-8, 27 bytes\); see whether a pr",
        ),
        ("tree", "list", "the answer is no list of files"),
        ("tree", "gated", r"owner/name at 0123.*ask for access"),
        ("file", "page", r"a\.parquet: the answer is not the file of 10240 bytes \(text/html.*sign in to"),
        ("file", "another size", "the answer is not the file of 10240 bytes .* 10239 bytes"),
        ("file", "gated", "403"),
    ],
)
def test_an_answer_that_is_not_what_was_asked_is_refused_in_one_line(server, tmp_path, place, fault, said):
    server.faults = {place: fault}
    hub = client(server)
    ask = {
        "tree": lambda: hub.list_files("owner/name", "dataset", COMMIT),
        "file": lambda: get(hub, tmp_path),
    }
    with pytest.raises(NetworkError, match=said) as caught:
        ask[place]()
    assert "\n" not in str(caught.value)
    assert server.waits == []
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("variable", "value", "said"),
    [
        ("HF_HUB_DOWNLOAD_TIMEOUT", "soon", "HF_HUB_DOWNLOAD_TIMEOUT is 'soon'; set it to a whole number"),
        ("HF_HUB_DOWNLOAD_TIMEOUT", "0", "HF_HUB_DOWNLOAD_TIMEOUT is '0'"),
        ("HF_HUB_ETAG_TIMEOUT", "-3", "HF_HUB_ETAG_TIMEOUT is '-3'"),
        ("SSL_CERT_FILE", "/nonexistent/ca.pem", r"SSL_CERT_FILE=/nonexistent/ca\.pem"),
        ("ALL_PROXY", "socks5://me:secret@127.0.0.1:9", r"ALL_PROXY=socks5://\[redacted\]@127\.0\.0\.1:9"),
        ("HTTPS_PROXY", "gopher://127.0.0.1:9", "HTTPS_PROXY=gopher://"),
    ],
)
def test_an_environment_that_cannot_work_is_named(server, monkeypatch, variable, value, said):
    from huggingface_hub.utils import close_session

    monkeypatch.setenv(variable, value)
    close_session()
    try:
        with pytest.raises(NetworkError, match=said) as caught:
            client(server).list_files("owner/name", "dataset", COMMIT)
    finally:
        close_session()
    assert "secret" not in str(caught.value)


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


def test_a_missing_file_and_an_unreachable_hub_are_told_apart(server, tmp_path):
    absent = HubFile("absent.parquet", 1, sha(b"x"))
    with pytest.raises(HubError, match="404"):
        get(client(server), tmp_path, absent)
    # Port 9 (discard) of this machine: nothing listens there.
    patience = Patience(attempts=2, sleep=server.waits.append)
    nowhere = HuggingFaceHub("http://127.0.0.1:9", patience=patience)
    with pytest.raises(NetworkError, match=r"cannot be reached.*needs a network"):
        nowhere.list_files("owner/name", "dataset", COMMIT)
    with pytest.raises(NetworkError, match=r"cannot be reached.*start again"):
        get(nowhere, tmp_path, patience=patience)
    assert server.waits == [1.0, 1.0]
    with pytest.raises(NetworkError, match=r"cannot be asked for .*check its address"):
        HuggingFaceHub("hub.example.org").list_files("owner/name", "dataset", COMMIT)


def test_offline_mode_is_said(server, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"offline mode, HF_HUB_OFFLINE.*choose a source that is local"):
        client(server).list_files("owner/name", "dataset", COMMIT)
