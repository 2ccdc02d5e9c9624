import io
import os
import stat
import subprocess
import sys
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from vpmoe_assets.codebase.snapshot import SnapshotError, lay_out, pack, unpack

FILES = {
    "trainer/__init__.py": b"",
    "trainer/a.py": b"A = 1\n",
    "configs/smoke.toml": "name = 'häßlich'\r\n".encode(),
    "vpmoe_assets/lineage/index.sql": b"\x00\xff",
}
part = st.text(st.characters(codec="utf-8", exclude_characters="/\0"), min_size=1, max_size=60).filter(
    lambda name: name not in (".", "..")
)
paths = st.lists(part, min_size=1, max_size=4).map("/".join)


def tree(directory) -> dict[str, bytes]:
    return {
        path.relative_to(directory).as_posix(): path.read_bytes()
        for path in directory.rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }


@settings(deadline=None)
@given(content=st.dictionaries(paths, st.binary(max_size=300), max_size=8))
def test_an_archive_holds_what_was_packed_and_depends_on_nothing_else(content):
    archive = pack(content)
    assert unpack(archive) == content
    assert pack(dict(reversed(content.items()))) == archive


def test_an_archive_says_nothing_of_when_where_and_by_whom_it_was_made():
    with tarfile.open(fileobj=io.BytesIO(pack(FILES))) as archive:
        for member in archive:
            assert (member.mtime, member.uid, member.gid, member.uname, member.gname) == (0, 0, 0, "", "")
            assert member.mode == 0o444
    assert pack(FILES)[4:8] == bytes(4)  # gzip's own time


def hostile(name: str = "a.py", kind: bytes = tarfile.REGTYPE, times: int = 1) -> bytes:
    whole = io.BytesIO()
    with tarfile.open(fileobj=whole, mode="w:gz") as archive:
        for _ in range(times):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
    return whole.getvalue()


@pytest.mark.parametrize(
    "archive",
    [
        hostile("/etc/passwd"),
        hostile("../a.py"),
        hostile("trainer/../../a.py"),
        hostile("./a.py"),
        hostile(kind=tarfile.SYMTYPE),
        hostile(kind=tarfile.LNKTYPE),
        hostile(kind=tarfile.DIRTYPE),
        hostile(kind=tarfile.FIFOTYPE),
        hostile(times=2),
        b"",
        b"no archive",
        pack(FILES)[:-20],
        pack(FILES)[:60],
    ],
    ids=[
        "absolute",
        "above",
        "through",
        "dotted",
        "symlink",
        "hardlink",
        "directory",
        "pipe",
        "twice",
        "empty",
        "no archive",
        "short",
        "cut",
    ],
)
def test_an_archive_of_anything_else_is_refused_and_nothing_is_laid_out(archive, tmp_path):
    with pytest.raises(SnapshotError):
        lay_out(archive, tmp_path / "there" / "sources")
    assert list(tmp_path.rglob("*")) == []


@pytest.mark.parametrize("path", ["", "/a.py", "../a.py", "a//b.py", "a/./b.py", "a/", "a\0.py"])
def test_a_path_that_leaves_the_tree_is_not_packed(path):
    with pytest.raises(SnapshotError, match="no plain path"):
        pack({path: b""})


def test_files_are_laid_out_read_only_in_directories_that_can_be_removed(tmp_path):
    lay_out(pack(FILES), tmp_path / "sources")
    assert tree(tmp_path / "sources") == FILES
    for path in (tmp_path / "sources").rglob("*"):
        writable = stat.S_IMODE(path.stat().st_mode) & 0o222
        assert bool(writable) == path.is_dir(), path
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_what_is_there_is_left_alone_with_its_bytecode(tmp_path):
    lay_out(pack(FILES), tmp_path / "sources")
    (tmp_path / "sources" / "trainer" / "__pycache__").mkdir()
    (tmp_path / "sources" / "trainer" / "__pycache__" / "a.cpython-312.pyc").write_bytes(b"code")
    before = (tmp_path / "sources").stat().st_ino
    lay_out(pack(FILES), tmp_path / "sources")
    assert (tmp_path / "sources").stat().st_ino == before
    assert (tmp_path / "sources" / "trainer" / "__pycache__" / "a.cpython-312.pyc").exists()


def edit(path, content: bytes) -> None:
    path.chmod(0o644)
    path.write_bytes(content)


def into_link(path) -> None:
    path.unlink()
    path.symlink_to("/dev/null")


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda root: edit(root / "trainer" / "a.py", b"A = 2\n"), "trainer/a.py was changed"),
        (lambda root: (root / "configs" / "smoke.toml").unlink(), "configs/smoke.toml is missing"),
        (lambda root: (root / "torch.py").write_text(""), "torch.py does not belong there"),
        (lambda root: (root / "torch").symlink_to("trainer"), "torch does not belong there"),
        (lambda root: into_link(root / "trainer" / "__init__.py"), "trainer/__init__.py was changed"),
    ],
)
def test_a_directory_that_was_tampered_with_is_replaced_and_the_file_named(tmp_path, caplog, damage, named):
    lay_out(pack(FILES), tmp_path / "sources")
    (tmp_path / "sources" / "trainer" / "__pycache__").mkdir()
    damage(tmp_path / "sources")
    lay_out(pack(FILES), tmp_path / "sources")
    assert tree(tmp_path / "sources") == FILES
    assert named in caplog.text
    assert not (tmp_path / "sources" / "trainer" / "__pycache__").exists()  # it may be of the other code
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]


def test_a_kill_half_way_leaves_no_half_of_it(tmp_path, monkeypatch):
    def dies(*arguments) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fdopen", dies)
    with pytest.raises(KeyboardInterrupt):
        lay_out(pack(FILES), tmp_path / "sources")
    assert not (tmp_path / "sources").exists()
    monkeypatch.undo()
    lay_out(pack(FILES), tmp_path / "sources")
    assert tree(tmp_path / "sources") == FILES


LAY_OUT = """
import sys
from pathlib import Path
from vpmoe_assets.codebase.snapshot import lay_out, pack
lay_out(pack({f"trainer/m{n}.py": bytes([65]) * 5000 for n in range(300)}), Path(sys.argv[1]))
"""


def test_processes_that_lay_out_the_same_at_once_share_it(tmp_path):
    command = [sys.executable, "-c", LAY_OUT, str(tmp_path / "sources")]
    started = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    assert len(tree(tmp_path / "sources")) == 300
    assert [path.name for path in tmp_path.iterdir()] == ["sources"]
