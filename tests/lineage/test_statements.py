"""Statements: append-only, in order, on disk, and noticed when anybody altered them."""

import json
import os
import string
from multiprocessing import get_context
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lineage.fabricate import publish
from trainer.contract.canonical import canonical_json, sha256_json
from vpmoe_assets.lineage import statements as module
from vpmoe_assets.lineage.errors import RecordError, StatementError
from vpmoe_assets.lineage.statements import KINDS, Statement, Statements
from vpmoe_assets.lineage.store import Store

pytestmark = pytest.mark.filterwarnings("ignore:This process:DeprecationWarning")  # fork is meant

A = "a" * 64


def said(number: int = 0, *, record: str = A, asset: str = "synth", kind: str = "pinned") -> Statement:
    return Statement(
        kind=kind,
        record=record,
        artifact=f"smoke/{asset}/20260131.1-{record[:8]}",
        time="2026-01-31T12:00:00+00:00",
        author="ann@here",
        reason=f"because {number}",
        body={"number": number},
    )


@pytest.fixture
def statements(tmp_path):
    return Statements(tmp_path)


def file_of(statements: Statements) -> Path:
    (path,) = statements.root.glob("*/*/*.jsonl")
    return path


def read(statements: Statements) -> tuple[Statement, ...]:
    """As another process would."""
    return Statements(statements.root.parent).about_digest("smoke", "synth", A)


def test_statements_are_kept_in_order_and_each_names_the_one_before_it(statements):
    written = [statements.append(said(number)) for number in range(5)]
    found = read(statements)
    assert list(found) == written
    assert [statement.body["number"] for statement in found] == list(range(5))
    assert [statement.previous for statement in found] == [None, *(s.id for s in written[:-1])]
    assert len({statement.id for statement in found}) == 5


def test_a_statement_can_be_read_by_whoever_has_only_sha256_and_json(statements):
    written = statements.append(said(7))
    fields = json.loads(file_of(statements).read_text())
    assert fields.pop("id") == sha256_json(fields) == written.id
    assert fields == {
        "schema": "vpmoe.statement/1",
        "kind": "pinned",
        "record": A,
        "artifact": "smoke/synth/20260131.1-aaaaaaaa",
        "time": "2026-01-31T12:00:00+00:00",
        "author": "ann@here",
        "reason": "because 7",
        "body": {"number": 7},
        "previous": None,
    }


def test_nothing_is_said_about_a_record_of_which_nobody_spoke(statements):
    assert read(statements) == ()
    assert statements.of_asset("smoke", "synth") == {}
    assert list(statements.all()) == []
    assert not statements.root.exists(), "asking writes nothing"


def test_what_is_said_about_a_record_outlives_it(tmp_path):
    store = Store(tmp_path)
    record = publish(store, "synth")
    store.statements.append(Statement.about(record, "pinned", reason="for the paper"))
    import shutil

    shutil.rmtree(store.directory(record))
    (found,) = Store(tmp_path).statements.of_asset("smoke", "synth")[record.record_digest]
    assert (found.artifact, found.reason) == (f"smoke/synth/{record.version}", "for the paper")
    assert [statement.id for statement in store.statements.all()] == [found.id]
    assert store.experiments() == ["smoke"], "they are no experiment"


def test_records_of_an_asset_are_found_by_the_kind_of_what_was_said(statements):
    statements.append(said(1))
    statements.append(said(2, record="b" * 64, kind="collected"))
    statements.append(said(3, record="c" * 64, asset="synth_kd_v1"))
    assert sorted(statements.of_asset("smoke", "synth")) == [A, "b" * 64]
    assert sorted(statements.of_asset("smoke", "synth", "collected")) == ["b" * 64]
    assert [statement.body["number"] for statement in statements.all()] == [1, 2, 3]


@pytest.mark.parametrize("cut", [1, 20, 10_000])
def test_a_line_that_a_kill_cut_short_was_never_said(statements, cut):
    first = statements.append(said(1))
    statements.append(said(2))
    path = file_of(statements)
    content = path.read_bytes()
    end = content.index(b"\n") + 1
    path.write_bytes(content[: max(end, len(content) - cut)])
    assert read(statements) == (first,)
    third = statements.append(said(3))
    assert third.previous == first.id
    assert read(statements) == (first, third)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_altered_or_missing_line_but_the_last_ones_is_noticed(tmp_path_factory, data):
    statements = Statements(tmp_path_factory.mktemp("store"))
    for number in range(4):
        statements.append(said(number))
    path = file_of(statements)
    lines = path.read_bytes().splitlines(keepends=True)
    victim = data.draw(st.integers(0, 2))
    if data.draw(st.booleans(), label="remove"):
        del lines[victim]
    else:
        offset = data.draw(st.integers(0, len(lines[victim]) - 2))
        new = data.draw(st.sampled_from(string.ascii_letters + string.digits).map(str.encode))
        changed = lines[victim][:offset] + new + lines[victim][offset + 1 :]
        if changed == lines[victim]:
            return
        lines[victim] = changed
    path.write_bytes(b"".join(lines))
    with pytest.raises(StatementError, match=rf"{path}:\d"):
        read(statements)
    with pytest.raises(StatementError):
        statements.append(said(9))
    assert path.read_bytes() == b"".join(lines), "nothing is added to what was altered"


def test_lines_in_another_order_or_of_another_record_are_noticed(statements):
    statements.append(said(1))
    statements.append(said(2))
    path = file_of(statements)
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(second + first)
    with pytest.raises(StatementError, match=":1: does not follow"):
        read(statements)
    path.write_bytes(first + second)
    path.with_name("b" * 64 + ".jsonl").write_bytes(first)
    with pytest.raises(StatementError, match="does not follow"):
        statements.about_digest("smoke", "synth", "b" * 64)


def test_an_altered_line_is_noticed_by_a_process_that_had_read_it(statements):
    statements.append(said(1))
    assert len(statements.about_digest("smoke", "synth", A)) == 1
    path = file_of(statements)
    path.write_text(path.read_text().replace("because 1", "because 11"))
    with pytest.raises(StatementError, match=":1: altered"):
        statements.about_digest("smoke", "synth", A)


def test_a_kind_of_a_later_program_is_kept_unread_and_one_of_nobody_is_refused(statements):
    first = statements.append(said(1))
    fields = {**said(2).model_dump(by_alias=True), "kind": "notarised", "previous": first.id}
    with file_of(statements).open("a") as file:
        file.write(canonical_json(fields | {"id": sha256_json(fields)}) + "\n")
    last = statements.append(said(3))
    assert [statement.kind for statement in read(statements)] == ["pinned", "notarised", "pinned"]
    assert last.previous == sha256_json(fields)
    with pytest.raises(StatementError, match="'notarised' is no kind of statement; there are verdict"):
        statements.append(said(4, kind="notarised"))


@pytest.mark.parametrize("kind", [kind for kind, keys in KINDS.items() if keys])
def test_a_statement_says_all_that_its_kind_has_to_say(statements, kind):
    with pytest.raises(StatementError, match=f"a {kind} without "):
        statements.append(said(1, kind=kind))
    assert read(statements) == ()


@pytest.mark.parametrize("artifact", ["smoke/../synth", "../x/v", "smoke/.hidden/v"])
def test_a_name_leads_nowhere_else(statements, artifact):
    with pytest.raises((RecordError, ValueError)):
        statements.append(said().model_copy(update={"artifact": artifact}))
    assert not statements.root.exists()


def test_no_credential_is_written(statements, monkeypatch):
    monkeypatch.setenv("WANDB_API_KEY", "s3cr3t-value-of-mine")
    statements.append(
        said().model_copy(
            update={"reason": "token=s3cr3t-value-of-mine", "body": {"seen": ["s3cr3t-value-of-mine"]}}
        )
    )
    assert "s3cr3t" not in file_of(statements).read_text()
    (found,) = read(statements)
    assert found.body == {"seen": ["[redacted]"]}


def _speak(root: Path, number: int) -> None:
    statements = Statements(root)
    for turn in range(10):
        statements.append(said(100 * number + turn))


def test_processes_that_speak_at_once_lose_nothing(tmp_path):
    context = get_context("fork")
    processes = [context.Process(target=_speak, args=(tmp_path, number)) for number in range(6)]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    found = Statements(tmp_path).about_digest("smoke", "synth", A)
    numbers = [statement.body["number"] for statement in found]
    assert sorted(numbers) == [100 * number + turn for number in range(6) for turn in range(10)]
    for number in range(6):
        own = [n for n in numbers if n // 100 == number]
        assert own == sorted(own), "in the order in which each spoke"


def test_a_failed_write_leaves_what_was_there(statements, monkeypatch):
    first = statements.append(said(1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module.os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        statements.append(said(2))
    monkeypatch.undo()
    assert read(statements)[0] == first


def test_a_lookup_that_nothing_changed_reads_no_file(statements, monkeypatch):
    statements.append(said(1))
    before = statements.about_digest("smoke", "synth", A)
    monkeypatch.setattr(Path, "read_bytes", lambda path: pytest.fail(f"{path} was read again"))
    assert statements.about_digest("smoke", "synth", A) is before


def test_a_person_without_a_name_is_still_somebody(monkeypatch):
    monkeypatch.setattr(module.getpass, "getuser", lambda: (_ for _ in ()).throw(KeyError("uid")))
    assert module.this_user().startswith(f"{os.getuid()}@")
