import hashlib
import os
import stat
import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.conftest import ROOT
from vpmoe_assets.lineage.errors import ObjectDamaged, ObjectMissing, SecretFoundError
from vpmoe_assets.lineage.objects import ObjectStore


@pytest.fixture
def objects(tmp_path) -> ObjectStore:
    return ObjectStore(tmp_path / "artifacts")


def names(objects: ObjectStore) -> list[str]:
    return sorted(path.name for path in objects.directory.iterdir())


def test_an_object_is_a_file_named_by_its_sha256(objects):
    content = b"\x00\xffwhatever\n"
    name = objects.put(content, "the thing")
    assert name == hashlib.sha256(content).hexdigest()
    assert objects.has(name)
    assert (objects.directory / name).read_bytes() == content == objects.get(name)
    assert names(objects) == [name]


@settings(deadline=None, max_examples=50)
@given(content=st.binary(max_size=200))
def test_what_was_put_is_what_one_gets(tmp_path_factory, content):
    objects = ObjectStore(tmp_path_factory.mktemp("objects"))
    assert objects.get(objects.put(content, "the thing")) == content


def test_equal_values_are_one_object_whatever_the_order_of_their_keys(objects):
    one = objects.put_json({"a": 1, "b": [1.5, None]}, "the thing")
    assert objects.put_json({"b": [1.5, None], "a": 1}, "the thing") == one
    assert objects.get_json(one) == {"a": 1, "b": [1.5, None]}


def test_an_object_that_is_there_is_not_written_again(objects):
    name = objects.put(b"x", "the thing")
    before = objects.path(name).stat()
    objects.put(b"x", "the thing")
    assert objects.path(name).stat() == before


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o444), (0o077, 0o400), (0o002, 0o444)])
def test_nobody_may_write_an_object_and_the_umask_says_who_may_read_it(objects, umask, mode):
    former = os.umask(umask)
    try:
        name = objects.put(b"x", "the thing")
    finally:
        os.umask(former)
    assert stat.S_IMODE(objects.path(name).stat().st_mode) == mode


def test_a_missing_object_and_a_word_that_names_none_are_said(objects):
    missing = "0" * 64
    assert not objects.has(missing)
    with pytest.raises(ObjectMissing, match=missing):
        objects.get(missing)
    for name in ("../../etc/passwd", "", "A" * 64, "0" * 63):
        with pytest.raises(ObjectMissing, match="64 hex digits"):
            objects.get(name)


def test_a_damaged_object_is_noticed_when_it_is_read_and_mended_when_it_is_put_again(objects):
    name = objects.put(b"content", "the thing")
    path = objects.path(name)
    path.chmod(0o644)
    path.write_bytes(b"c0ntent")
    with pytest.raises(ObjectDamaged, match=str(path)):
        objects.get(name)
    objects.put(b"content", "the thing")
    assert objects.get(name) == b"content"
    assert names(objects) == [name]


def test_the_value_of_a_secret_variable_is_refused_with_its_place_and_not_shown(objects, monkeypatch):
    monkeypatch.setenv("HUB_TOKEN", "correct-horse")
    with pytest.raises(SecretFoundError, match=r"the patch, line 3: .*HUB_TOKEN") as refused:
        objects.put(b"a\nb\n+key = 'correct-horse'\n", "the patch")
    assert "correct-horse" not in str(refused.value)
    with pytest.raises(SecretFoundError, match=r"the run configuration .* \$\.ops\[1\]"):
        objects.put_json({"ops": ["fine", "correct-horse"]}, "the run configuration")
    assert not objects.directory.exists()


WRITER = """
import sys
from pathlib import Path
from vpmoe_assets.lineage.objects import ObjectStore
objects = ObjectStore(Path(sys.argv[1]))
for n in range(40):
    content = bytes([n]) * 100_000
    assert objects.get(objects.put(content, "the thing")) == content
"""


def test_processes_that_put_the_same_objects_at_once_never_see_a_part_of_one(objects):
    command = [sys.executable, "-c", WRITER, str(objects.directory.parent)]
    started = [subprocess.Popen(command, cwd=ROOT) for _ in range(4)]
    assert [process.wait(60) for process in started] == [0] * 4
    assert len(names(objects)) == 40
    assert all(objects.get(name) for name in names(objects))


def test_a_write_that_fails_leaves_nothing(objects, monkeypatch):
    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        objects.put(b"x", "the thing")
    assert names(objects) == []
