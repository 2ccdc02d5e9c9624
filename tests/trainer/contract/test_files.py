import errno
import json
import os
import resource

import pytest

from trainer.contract.files import remove_tree, replace_bytes, replace_json, replace_text, sync
from vpmoe_assets.lineage.sealing import write_sealed


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole(tmp_path, durable):
    replace_text(tmp_path / "x", "one", durable=durable)
    replace_text(tmp_path / "x", "two – ü", durable=durable)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == "two – ü".encode()


def test_json_keeps_the_order_of_its_keys_and_refuses_nan(tmp_path):
    replace_json(tmp_path / "x", {"b": 1, "a": [1.5, None]})
    assert (tmp_path / "x").read_text() == '{\n  "b": 1,\n  "a": [\n    1.5,\n    null\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        replace_json(tmp_path / "x", {"a": float("nan")})
    assert json.loads((tmp_path / "x").read_text())["b"] == 1


def test_content_is_on_the_disk_before_the_name_and_the_name_before_the_return(tmp_path, monkeypatch):
    order = []
    fsync, rename = os.fsync, type(tmp_path).replace

    def synced(descriptor):
        order.append(("sync", os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}"))))
        fsync(descriptor)

    def renamed(path, target):
        order.append(("rename", target.name))
        return rename(path, target)

    monkeypatch.setattr("os.fsync", synced)
    monkeypatch.setattr(type(tmp_path), "replace", renamed)
    replace_bytes(tmp_path / "x", b"one")
    (_, scratch), *others = order
    assert scratch.startswith(f".x.{os.getpid()}-")
    assert (order[0][0], others) == ("sync", [("rename", "x"), ("sync", tmp_path.name)])
    order.clear()
    replace_bytes(tmp_path / "x", b"two", durable=False)
    assert order == [("rename", "x")]
    sync(tmp_path / "x")
    assert order[1:] == [("sync", "x")]


@pytest.fixture
def full_disk():
    """Files of this process cannot grow beyond a hundred bytes: the system refuses the rest."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, before[1]))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("write", [replace_bytes, write_sealed])
def test_what_cannot_be_written_leaves_the_old_file_and_nothing_else(tmp_path, full_disk, write):
    write(tmp_path / "x", b"one")
    with pytest.raises(OSError, match="File too large"):
        write(tmp_path / "x", b"two" * 100)
    assert [path.name for path in tmp_path.iterdir()] == ["x"]
    assert (tmp_path / "x").read_bytes() == b"one"


def test_two_machines_whose_processes_have_one_number_replace_a_file_at_once(tmp_path, monkeypatch):
    fsync = os.fsync

    def meanwhile(descriptor):
        monkeypatch.setattr("os.fsync", fsync)
        replace_bytes(tmp_path / "x", b"the other's")
        fsync(descriptor)

    monkeypatch.setattr("os.fsync", meanwhile)
    replace_bytes(tmp_path / "x", b"own")
    assert (tmp_path / "x").read_bytes() == b"own"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_what_somebody_has_open_on_nfs_stays_and_all_else_is_removed(tmp_path, monkeypatch):
    doomed = tmp_path / "doomed"
    (doomed / "deep" / "er").mkdir(parents=True)
    for name in ("a", "deep/b", "deep/er/.nfs0000000000a1"):
        (doomed / name).write_text("x")
    unlink = os.unlink

    def as_nfs(name, **place):
        if name.startswith(".nfs"):
            raise OSError(errno.EBUSY, "Device or resource busy")
        unlink(name, **place)

    monkeypatch.setattr("os.unlink", as_nfs)
    remove_tree(doomed)
    assert [path for path in doomed.rglob("*") if path.is_file()] == [doomed / "deep/er/.nfs0000000000a1"]
    monkeypatch.setattr("os.unlink", unlink)  # it is closed
    remove_tree(doomed)
    assert not doomed.exists()


def test_what_cannot_be_removed_for_another_reason_is_an_error(tmp_path, monkeypatch):
    (tmp_path / "doomed").mkdir()
    (tmp_path / "doomed" / "a").write_text("x")

    def busy(name, **place):
        raise OSError(errno.EBUSY, "Device or resource busy")

    monkeypatch.setattr("os.unlink", busy)
    with pytest.raises(OSError, match="busy"):
        remove_tree(tmp_path / "doomed")
