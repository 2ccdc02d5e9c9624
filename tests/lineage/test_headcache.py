"""Heads are remembered while their records are what they were, and parsed when they are asked for."""

import json
import shutil
import sqlite3
import time
from pathlib import Path

import pytest

from tests.lineage.fabricate import damage, publish
from vpmoe_assets.lineage import filememory, headcache
from vpmoe_assets.lineage.heads import Head
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def history(tmp_path, monkeypatch):
    """Four versions of an asset, remembered; reading a record again is an error."""
    monkeypatch.setattr(filememory, "_SETTLED_NS", 0)
    store = Store(tmp_path / "artifacts")
    records = [publish(store, "a", metrics={"rows": rows}) for rows in range(4)]
    time.sleep(0.02)
    assert len(store.scan("smoke", "a")[0]) == 4
    return store.root, records


@pytest.fixture
def unread(history, monkeypatch):
    """The same, where reading a record is an error."""
    monkeypatch.setattr(headcache, "read_record", lambda path: pytest.fail(f"{path} was read again"))
    return history


@pytest.fixture
def parsed(monkeypatch):
    """The versions whose heads were parsed."""
    found, parse = [], headcache._parsed

    def count(text):
        head = parse(text)
        found.append(None if head is None else head.version)
        return head

    monkeypatch.setattr(headcache, "_parsed", count)
    return found


def directory_of(root: Path) -> Path:
    return root / "smoke" / "a"


def remembered(root: Path) -> str:
    """Return what is remembered of the asset as a whole."""
    with sqlite3.connect(root / ".work" / "heads.sqlite") as database:
        ((text,),) = database.execute(
            "SELECT value FROM remembered WHERE path = ?", [bytes(directory_of(root))]
        ).fetchall()
    return text


def remember(root: Path, text: str) -> None:
    with sqlite3.connect(root / ".work" / "heads.sqlite") as database:
        database.execute("UPDATE remembered SET value = ? WHERE path = ?", [text, bytes(directory_of(root))])


def test_a_fresh_process_takes_all_heads_from_memory(unread):
    root, records = unread
    assert list(Store(root).scan("smoke", "a")[0]) == [Head.of(record) for record in records]


def test_only_what_is_asked_for_is_parsed(unread, parsed):
    root, records = unread
    heads, damaged = Store(root).scan("smoke", "a")
    assert (len(heads), damaged, parsed) == (4, [], [])
    assert heads.record_digests == tuple(record.record_digest for record in records)
    assert heads.own_size == sum(record.size for record in records)
    assert parsed == []
    assert heads[-1] == heads[-1] == Head.of(records[-1])
    assert parsed == [records[-1].version]
    assert heads[1:3] == [Head.of(record) for record in records[1:3]]
    assert parsed == [records[place].version for place in (3, 1, 2)]


def test_what_is_published_afterwards_is_there_at_once_and_remembered_with_the_others(history, parsed):
    root, _ = history
    more = publish(Store(root), "a", metrics={"rows": 4})
    assert Store(root).scan("smoke", "a")[0][-1] == Head.of(more)
    time.sleep(0.02)
    assert len(Store(root).scan("smoke", "a")[0]) == 5
    parsed.clear()
    assert len(Store(root).scan("smoke", "a")[0]) == 5
    assert parsed == []


def test_a_removed_version_is_gone(history):
    root, records = history
    shutil.rmtree(directory_of(root) / records[1].version)
    heads = Store(root).scan("smoke", "a")[0]
    assert [head.version for head in heads] == [records[place].version for place in (0, 2, 3)]


def test_a_damaged_record_is_found_whatever_was_remembered(history):
    root, records = history
    damage(directory_of(root) / records[2].version / ".artifact.json", 60)
    heads, damaged = Store(root).scan("smoke", "a")
    assert [bad.version for bad in damaged] == [records[2].version]
    assert [head.version for head in heads] == [records[place].version for place in (0, 1, 3)]
    assert [bad.version for bad in Store(root).damaged()] == [records[2].version]


def test_a_copied_directory_is_not_taken_for_what_it_was(history):
    root, records = history
    shutil.copytree(directory_of(root), root / "smoke" / "b")
    heads, damaged = Store(root).scan("smoke", "b")
    assert len(heads) == 0
    assert sorted(bad.version for bad in damaged) == sorted(record.version for record in records)


def shelf_of_another_program(text):
    first, *heads = text.split("\n")
    shape, *lines = json.loads(first)
    return "\n".join([json.dumps([[*shape, ["more"]], *lines]), *heads])


def shelf_cut_short(text):
    return text[: len(text) // 2]


def shelf_without_its_last_head(text):
    return text.rpartition("\n")[0]


def shelf_of_numbers(text):
    return "[" + text.partition("\n")[0].partition("[[")[0] + "1, 2, 3]"


def heads_of_another_program(text):
    return text.replace('"fingerprint":', '"print":')


def heads_in_another_order(text):
    first, *heads = text.split("\n")
    return "\n".join([first, *reversed(heads)])


@pytest.mark.parametrize(
    "change",
    [
        shelf_of_another_program,
        shelf_cut_short,
        shelf_without_its_last_head,
        shelf_of_numbers,
        heads_of_another_program,
        heads_in_another_order,
    ],
)
def test_what_is_remembered_of_another_program_or_torn_is_read_again(history, change):
    root, records = history
    text = remembered(root)
    remember(root, change(text))
    assert remembered(root) != text
    assert list(Store(root).scan("smoke", "a")[0]) == [Head.of(record) for record in records]
