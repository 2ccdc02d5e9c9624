"""What was read from a file is remembered while nothing about the file has changed, and never longer."""

import os
import sqlite3
import subprocess
import time
from multiprocessing import get_context
from types import SimpleNamespace

import pytest

from vpmoe_assets.codebase.tree import SourceTree
from vpmoe_assets.lineage import filememory, hashcache
from vpmoe_assets.lineage.digest import file_sha256, hash_files
from vpmoe_assets.lineage.filememory import FileMemory, identity
from vpmoe_assets.lineage.hashcache import HashCache
from vpmoe_assets.lineage.provenance import code_of
from vpmoe_assets.lineage.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork is meant


@pytest.fixture
def hashed(monkeypatch):
    """The files that were really read, with no time for a file to settle."""
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)
    read = []

    def count(files):
        read.extend(files)
        return hash_files(files)

    monkeypatch.setattr(hashcache, "hash_files", count)
    return read


def test_an_untouched_file_is_read_once_and_every_write_is_noticed(tmp_path, hashed):
    cache, file = HashCache(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"0123456789")
    time.sleep(0.02)
    assert cache([file]) == cache([file]) == [file_sha256(file)]
    assert hashed == [file]
    before = file.stat()
    file.write_bytes(b"0123456780")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert cache([file]) == [file_sha256(file)]


def test_another_process_knows_it_too(tmp_path, hashed):
    files = [tmp_path / f"{n:04}" for n in range(1200)]
    for n, file in enumerate(files):
        file.write_bytes(b"%d" % n)
    time.sleep(0.02)
    digests = HashCache(tmp_path / "c.sqlite")(files)
    assert len(hashed) == 1200
    assert HashCache(tmp_path / "c.sqlite")(files) == digests == hash_files(files)
    assert len(hashed) == 1200


def test_a_file_that_changed_a_moment_ago_is_not_remembered(tmp_path, hashed, monkeypatch):
    monkeypatch.setattr(filememory, "_SETTLED_NS", 2_000_000_000)
    cache, file = HashCache(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"x")
    cache([file])
    cache([file])
    assert hashed == [file, file]


@pytest.mark.parametrize("content", [b"this is not a database" * 100, b""])
def test_a_broken_database_is_made_anew(tmp_path, hashed, content):
    cache, file = HashCache(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"x")
    time.sleep(0.02)
    cache([file])
    (tmp_path / "c.sqlite").write_bytes(content)
    for _ in range(3):
        assert cache([file]) == [file_sha256(file)]
    assert len(hashed) <= 3
    assert HashCache(tmp_path / "c.sqlite")([file]) == [file_sha256(file)]
    assert len(hashed) <= 3


def test_a_database_of_another_shape_or_in_a_place_that_cannot_be_written_is_passed_over(tmp_path, hashed):
    file = tmp_path / "f"
    file.write_bytes(b"x")
    with sqlite3.connect(tmp_path / "c.sqlite") as other:
        other.execute("CREATE TABLE remembered (something TEXT)")
    (tmp_path / "occupied").write_bytes(b"a file where the directory should be")
    for path in (tmp_path / "c.sqlite", tmp_path / "occupied" / "c.sqlite"):
        assert HashCache(path)([file]) == [file_sha256(file)]


def test_a_database_that_is_removed_while_it_is_open_costs_nothing_but_time(tmp_path, hashed):
    cache, file = HashCache(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"x")
    time.sleep(0.02)
    for _ in range(2):
        assert cache([file]) == [file_sha256(file)]
        (tmp_path / "c.sqlite").unlink()
    assert len(hashed) == 2


def recall_in_child(memory: FileMemory, known, answers) -> None:
    answers.put(memory.recall(known))


def test_a_fork_goes_on_with_a_connection_of_its_own(tmp_path):
    memory, file = FileMemory(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"x")
    known = {file: identity(file.stat())}
    memory.keep([(file, known[file], "said")])
    context = get_context("fork")
    answers = context.Queue()
    child = context.Process(target=recall_in_child, args=(memory, known, answers))
    child.start()
    assert answers.get(timeout=30) == {file: "said"}
    child.join(timeout=30)
    assert memory.recall(known) == {file: "said"}


def test_files_beside_the_sources_are_read_once_for_all_assets_of_a_run(hashed, tmp_path):
    root = tmp_path / "checkout"
    (root / "old").mkdir(parents=True)
    (root / "old" / "weights").write_bytes(b"large")
    run = ["git", "-C", root, "-c", "user.name=t", "-c", "user.email=t@t"]
    for arguments in (["init", "-q"], ["commit", "-q", "--allow-empty", "-m", "one"]):
        subprocess.run([*run, *arguments], check=True)
    (root / "trainer").mkdir()
    (root / "trainer" / "a.py").write_text("A = 1\n")
    subprocess.run([*run, "add", "trainer"], check=True)
    store = Store(tmp_path / "store")
    first = code_of(SourceTree(root), store.hasher)
    assert code_of(SourceTree(root), store.hasher) == first == code_of(SourceTree(root))
    assert hashed == [root / "old" / "weights"]
    (root / "old" / "weights").write_bytes(b"other")
    assert code_of(SourceTree(root), store.hasher).state.patch_digest != first.state.patch_digest


def test_a_row_that_was_not_asked_for_says_nothing(tmp_path, monkeypatch):
    """As from a database that is torn: on a shared file system machines may cache each other's pages."""
    memory, file = FileMemory(tmp_path / "c.sqlite"), tmp_path / "f"
    file.write_bytes(b"0")
    known = identity(file.stat())
    memory.keep([(file, known, "of this")])
    others = [(b"/of/another/machine", *known, "of that"), (os.fsencode(file), *known, "of this")]
    database = SimpleNamespace(execute=lambda *asked: others)
    monkeypatch.setattr(memory, "_open", lambda: database)
    assert memory.recall({file: known}) == {file: "of this"}
