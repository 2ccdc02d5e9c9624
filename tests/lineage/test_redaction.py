import json

import pytest

from tests.lineage.fabricate import draft, fill, publish, recipe
from vpmoe_assets.lineage.errors import SecretFoundError
from vpmoe_assets.lineage.integrity import run_problems
from vpmoe_assets.lineage.record import RECORD_NAME
from vpmoe_assets.lineage.redaction import (
    REDACTED,
    is_secret_name,
    redact,
    redact_command,
    redact_text,
)
from vpmoe_assets.lineage.store import Store

HF = "hf_" + "aBcDeFgHiJkLmNoPqRsT"


@pytest.mark.parametrize(
    "name",
    ["HF_TOKEN", "token", "WANDB_API_KEY", "api-key", "aws.secret", "DB_PASSWORD", "AWS_SECRET_ACCESS_KEY"],
)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name", ["tokenizer", "max_tokens", "author", "bos_token", "eos_token_id", "tokens", "keyboard", "monkey"]
)
def test_ordinary_names_are_left_alone(name):
    assert not is_secret_name(name)


@pytest.mark.parametrize(
    ("argv", "expected"),
    [
        (["x", "--token", "abc"], ("x", "--token", REDACTED)),
        (["x", "--hf-token=abc"], ("x", f"--hf-token={REDACTED}")),
        (["x", "--token", "--json"], ("x", "--token", "--json")),
        (["env", "WANDB_API_KEY=abc", "run"], ("env", f"WANDB_API_KEY={REDACTED}", "run")),
        (["x", "--tokenizer", "o200k", "--max-tokens=5"], ("x", "--tokenizer", "o200k", "--max-tokens=5")),
        (["git", "clone", "https://me:pw@host/x"], ("git", "clone", f"https://{REDACTED}@host/x")),
    ],
)
def test_command_lines_lose_their_secrets_and_nothing_else(argv, expected):
    assert redact_command(argv, secrets=()) == expected


@pytest.mark.parametrize(
    "text",
    [
        f"logged in with {HF} ok",
        "Authorization: Bearer eyJhbGciOiJIUzI1NiJ9.abc",
        "key AKIAIOSFODNN7EXAMPLE end",
        "-----BEGIN RSA PRIVATE KEY-----\nMIIE\n-----END RSA PRIVATE KEY-----",
        '{"password": "hunter2hunter2"}',
    ],
)
def test_credentials_are_recognised_by_their_shape(text):
    assert REDACTED in redact_text(text)
    for part in (HF, "eyJhbGci", "AKIAIOSFODNN7EXAMPLE", "MIIE", "hunter2"):
        assert part not in redact_text(text)


@pytest.mark.parametrize(
    "text", ["Basic arithmetic is taught", "eos_token=199999", "https://host/path@v2", "sha " + "a1" * 20]
)
def test_ordinary_text_is_left_alone(text):
    assert redact_text(text) == text


def test_nested_values_keep_their_shape():
    found = redact({"a": [{"api_key": "x", "n": 1, "bos_token": "<s>"}], "t": (HF,)}, secrets=())
    assert found == {"a": [{"api_key": REDACTED, "n": 1, "bos_token": "<s>"}], "t": [REDACTED]}


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
        (work.run / "state.bin").write_bytes(binary)
        record = store.publish(work, draft(payload))
    run = store.directory(record) / "run"
    hidden = REDACTED.encode()
    assert (run / "wandb" / "debug.log").read_bytes() == log % (hidden, hidden, hidden)
    assert (run / "plain.txt").read_bytes() == untouched
    assert (run / "state.bin").read_bytes() == binary
    assert [line for line in caplog.messages if "credential" in line] == [
        "smoke/synth: a credential was removed from run/wandb/debug.log"
    ]
    assert run_problems(store.directory(record), record) == []
