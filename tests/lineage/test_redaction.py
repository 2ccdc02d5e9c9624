import json

import pytest

from tests.lineage.fabricate import draft, fill, publish, recipe
from trainer.contract.credentials import REDACTED
from vpmoe_assets.lineage.errors import SecretFoundError
from vpmoe_assets.lineage.integrity import run_problems
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.store import Store

HF = "hf_" + "aBcDeFgHiJkLmNoPqRsT"


def test_no_secret_of_the_environment_reaches_a_record(tmp_path, monkeypatch):
    secret = "correct-horse-battery"
    monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
    store = Store(tmp_path)
    record = publish(
        store,
        "synth",
        command=("python", "-c", f"login('{secret}')", "--password", "short"),
        execution={"url": f"https://u:{secret}@h"},
        environment={"variables": {"VPMOE_X": secret}},
        details={"log": [f"used {secret}"]},
        checks=[
            {"name": "c", "passed": True, "blocking": True, "description": secret, "metadata": {"m": secret}}
        ],
        metrics={"note": secret},
    )
    text = (store.directory(record) / RECORD_NAME).read_text()
    assert secret not in text
    assert "short" not in text
    (statement,) = store.statements.about(record)
    assert statement.body["description"] == statement.body["metadata"]["m"] == REDACTED
    assert secret not in "".join(path.read_text() for path in store.statements.root.rglob("*.jsonl"))
    assert json.loads(text)["command"] == ["python", "-c", f"login('{REDACTED}')", "--password", REDACTED]


def test_a_secret_in_the_recipe_is_refused_because_the_identity_may_not_be_edited(tmp_path):
    store = Store(tmp_path)
    fingerprint, payload = recipe("synth", hub={"auth": HF})
    with store.work_area("smoke", "synth", fingerprint) as work:
        fill(work)
        with pytest.raises(SecretFoundError, match=r"\$\.recipe\.hub\.auth"):
            store.publish(work, draft(payload))
        assert (work.payload / "data.bin").exists()
    assert store.latest("smoke", "synth") is None


def test_no_credential_reaches_the_files_beside_a_payload_and_other_bytes_stay(tmp_path, monkeypatch, caplog):
    secret = "correct-horse-battery"
    monkeypatch.setenv("MY_SERVICE_TOKEN", secret)
    store = Store(tmp_path)
    fingerprint, payload = recipe("synth")
    log = b"start\r\nlogin with %b\nnot \xff text, %b\nno newline at the end: %b"
    untouched = b"the password: unchanged, token: abcdefgh12\n"
    binary = b"\0\1" + secret.encode()
    with store.work_area("smoke", "synth", fingerprint) as work:
        fill(work)
        (work.run / "wandb").mkdir()
        (work.run / "wandb" / "debug.log").write_bytes(log % (secret.encode(), HF.encode(), secret.encode()))
        (work.run / "plain.txt").write_bytes(untouched)
        (work.run / "checkpoints").mkdir()
        (work.run / "checkpoints" / "state.bin").write_bytes(binary)
        (work.run / "wandb" / "run.wandb").write_bytes(b"\0" * (1 << 20) + binary)
        (work.run / "wandb" / "clean.wandb").write_bytes(b"\0" * 100)
        record = store.publish(work, draft(payload))
    run = store.directory(record) / "run"
    hidden = REDACTED.encode()
    assert (run / "wandb" / "debug.log").read_bytes() == log % (hidden, hidden, hidden)
    assert (run / "plain.txt").read_bytes() == untouched
    assert (run / "checkpoints" / "state.bin").read_bytes() == binary
    assert {path.name for path in (run / "wandb").iterdir()} == {"debug.log", "clean.wandb"}
    assert caplog.messages == [
        "smoke/synth: a credential was removed from run/wandb/debug.log",
        "smoke/synth: run/wandb/run.wandb left out: it holds a secret",
    ]
    assert run_problems(store.directory(record), record) == []


@pytest.mark.parametrize(
    ("files", "manifest", "said"),
    [
        (
            {"config.json": b'{"hub": "correct-horse-battery"}'},
            None,
            "payload/config.json holds the value",
        ),
        (
            {"data.bin": b"\0correct-horse-battery"},
            None,
            "payload/data.bin holds the value",
        ),
        ({"a": b"1"}, {"source": "https://me:hunter@host/x"}, "manifest.json, line 1: holds a credential"),
    ],
)
def test_a_payload_or_manifest_with_a_secret_is_not_published_and_stays(
    tmp_path, monkeypatch, files, manifest, said
):
    monkeypatch.setenv("MY_SERVICE_TOKEN", "correct-horse-battery")
    store = Store(tmp_path)
    fingerprint, payload = recipe("synth")
    with store.work_area("smoke", "synth", fingerprint) as work:
        fill(work, files, manifest)
        with pytest.raises(SecretFoundError) as refused:
            store.publish(work, draft(payload))
        assert {path.name for path in work.payload.iterdir()} == set(files)
    assert str(refused.value).startswith(f"smoke/synth: {said}")
    assert "nothing was published" in str(refused.value)
    assert "horse" not in str(refused.value)
    assert store.latest("smoke", "synth") is None


def test_prose_in_a_payload_may_speak_of_credentials(tmp_path):
    publish(Store(tmp_path), "synth", files={"rows.jsonl": b'{"text": "git clone https://me:pw@host/x"}'})
