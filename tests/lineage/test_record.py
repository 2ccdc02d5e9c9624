import hashlib
import json

import pytest
from pydantic import ValidationError

from tests.lineage.fabricate import publish
from trainer.contract.canonical import UnstableValueError
from vpmoe_assets.lineage.errors import RecordError
from vpmoe_assets.lineage.record import RECORD_NAME, CodeState, InputRef, Record, read_record, record_digest
from vpmoe_assets.lineage.store import Store


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path)


@pytest.fixture
def record(store):
    parent = publish(store, "synth")
    return publish(
        store,
        "synth_kd_v1",
        (parent,),
        manifest={"rows": 1},
        metrics={"loss": 1.0, "rows": 3},
        details={"x": [1.5]},
    )


def naive_digest(path):
    """Recompute from the file alone, as somebody without this package would."""
    fields = json.loads(path.read_text())
    fields.pop("record_digest")
    text = json.dumps(fields, sort_keys=True, separators=(",", ":"), ensure_ascii=True)
    return hashlib.sha256(text.encode()).hexdigest()


def rewrite(path, change):
    """Change fields and make the digest right again, as a careful forger would."""
    fields = json.loads(path.read_text())
    change(fields)
    path.chmod(0o644)
    path.write_text(json.dumps(fields))
    fields["record_digest"] = naive_digest(path)
    path.write_text(json.dumps(fields))


def test_digest_can_be_recomputed_with_json_and_hashlib_alone(store, record):
    path = store.directory(record) / RECORD_NAME
    assert naive_digest(path) == record.record_digest == record_digest(record)
    assert json.loads(path.read_text())["record_digest"] == record.record_digest


def test_reading_gives_back_what_was_published(store, record):
    again = read_record(store.directory(record) / RECORD_NAME)
    assert again == record
    assert again.record_digest == record.record_digest
    assert type(again.metrics["loss"]) is float
    assert type(again.metrics["rows"]) is int


def test_an_input_names_the_digest_of_its_record(store, record):
    parent = store.find("smoke", "synth")
    assert record.inputs == (
        InputRef(
            asset="synth",
            version=parent.version,
            digest=parent.digest,
            record_digest=naive_digest(store.directory(parent) / RECORD_NAME),
            role="synth",
        ),
    )


def test_any_changed_field_is_noticed(store, record):
    path = store.directory(record) / RECORD_NAME
    original = path.read_text()
    path.chmod(0o644)
    fields = json.loads(original)
    for key in fields:
        changed = dict(fields)
        changed[key] = "x"
        path.write_text(json.dumps(changed))
        with pytest.raises(RecordError):
            read_record(path)
    path.write_text(original[: len(original) // 2])
    with pytest.raises(RecordError, match="not a JSON record"):
        read_record(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: f["files"][0].update(path="../../etc/passwd"), "plain path"),
        (lambda f: f["files"][0].update(path="/etc/passwd"), "plain path"),
        (lambda f: f["run_files"].append({"path": "a/../b", "size": 1, "sha256": "0" * 64}), "plain path"),
        (lambda f: f["files"][0].update(size=1), "Merkle root"),
        (lambda f: f["fingerprint_payload"]["recipe"].update(lr=1), "fingerprint"),
        (lambda f: f.update(asset="../other"), "no name"),
        (lambda f: f["inputs"][0].update(asset=".."), "no name"),
        (lambda f: f["code"].update(git_sha=None), "code.git_sha"),
        (lambda f: f.update(surprise=1), "surprise"),
        (lambda f: f.update(schema="vpmoe.artifact/3"), "schema 'vpmoe.artifact/3', expected"),
        (lambda f: f.update(sequence=0), "sequence"),
        (lambda f: f.update(started_utc="2026-01-31T11:00:00"), "offset"),
    ],
)
def test_a_forged_record_with_a_right_digest_is_still_checked(store, record, change, message):
    path = store.directory(record) / RECORD_NAME
    rewrite(path, change)
    with pytest.raises(RecordError, match=message) as error:
        read_record(path)
    assert str(path) in str(error.value)


def test_a_commit_is_never_null():
    with pytest.raises(ValidationError, match="git_sha"):
        CodeState(git_sha=None, git_dirty=False, patch_digest=None, source_digest="b" * 64)


def test_values_without_a_stable_form_are_refused_before_anything_is_published(store):
    with pytest.raises(UnstableValueError, match="nan"):
        publish(store, "x", details={"loss": float("nan")})
    assert store.latest("smoke", "x") is None


def test_records_are_frozen(record):
    with pytest.raises(ValidationError):
        record.version = "other"
    assert isinstance(record, Record)
