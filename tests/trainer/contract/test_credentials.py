"""What counts as a secret, and what is left of a text, a command line or an error that held one."""

import json
import logging
import subprocess
import time
from urllib.error import URLError

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.contract import log_records
from trainer.contract.credentials import (
    REDACTED,
    clean_error,
    find_credential,
    find_secret,
    is_secret_name,
    known_secrets,
    redact,
    redact_command,
    redact_text,
    redacted_lines,
    without_credentials,
)
from trainer.contract.surroundings import surroundings

HF = "hf_" + "aBcDeFgHiJkLmNoPqRsT"


@pytest.mark.parametrize(
    "name",
    [
        "HF_TOKEN",
        "token",
        "WANDB_API_KEY",
        "api-key",
        "aws.secret",
        "DB_PASSWORD",
        "AWS_SECRET_ACCESS_KEY",
        "PGPASSWORD",
        "MYSQL_PWD",
        "VPMOE_KEY_PASSPHRASE",
        "accessToken",
    ],
)
def test_names_of_secrets_are_known(name):
    assert is_secret_name(name)


@pytest.mark.parametrize(
    "name",
    [
        "tokenizer",
        "max_tokens",
        "author",
        "bos_token",
        "eos_token_id",
        "tokens",
        "keyboard",
        "monkey",
        "OLDPWD",
        "PWD",
        "HF_TOKEN_PATH",
        "key_env",
        "api_key_env",
    ],
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
    "text",
    [
        "Basic arithmetic is taught",
        "eos_token=199999",
        "https://host/path@v2",
        "http://host:8000/v1/a@b",
        "git+ssh://git@host/x",
        "hf_hub_download_of_files",
        "sha " + "a1" * 20,
    ],
)
def test_ordinary_text_is_left_alone(text):
    assert redact_text(text) == text


def test_nested_values_keep_their_shape():
    found = redact({"a": [{"api_key": "x", "n": 1, "bos_token": "<s>"}], "t": (HF,)}, secrets=())
    assert found == {"a": [{"api_key": REDACTED, "n": 1, "bos_token": "<s>"}], "t": [REDACTED]}


@pytest.mark.parametrize(
    ("address", "safe"),
    [
        ("https://me:pass@word@host/x", f"https://{REDACTED}@host/x"),
        ("http://me:a/b@host:8080/x", f"http://{REDACTED}@host:8080/x"),
        ("socks5://:pw@host", f"socks5://{REDACTED}@host"),
        ("git+https://x:pw@host/a.git@main", f"git+https://{REDACTED}@host/a.git@main"),
        (
            "https://h/f?a=1&X-Amz-Signature=0123456789ab&b=2",
            f"https://h/f?a=1&X-Amz-Signature={REDACTED}&b=2",
        ),
        ("https://h/f?token=0123456789", f"https://h/f?token={REDACTED}"),
    ],
)
def test_addresses_keep_all_but_their_credentials(address, safe):
    assert without_credentials(f"GET {address} failed", ()) == f"GET {safe} failed"


@pytest.mark.parametrize(
    "unit",
    [
        "a",
        "a.",
        "token",
        "a://b:c",
        "eyJ-",
        "://",
        "a:",
        "Bearer ",
        "?key=",
        "token:",
        "sk-",
        "@",
        "--token=",
    ],
)
def test_a_line_of_any_length_takes_no_more_than_its_length(unit):
    line = unit * (200_000 // len(unit))
    began = time.process_time()
    redact_text(line, ("swordfish-9",))
    assert time.process_time() - began < 2.0


def test_a_private_key_of_many_lines_leaves_nothing_but_its_lines():
    text = "before\n-----BEGIN PRIVATE KEY-----\nMIIE\r\nQUJD\n-----END PRIVATE KEY----- after\nlast"
    safe = "".join(line for _, line in redacted_lines(text.splitlines(keepends=True), ()))
    assert safe == f"before\n{REDACTED}\n\r\n\n after\nlast"


def test_what_programs_of_this_user_keep_is_known(tmp_path):
    (tmp_path / ".netrc").write_text("machine api.wandb.ai\n  login user\n  password 0123456789abcdef\n")
    (tmp_path / ".git-credentials").write_text("https://me:ghost-in-shell@host\n")
    (tmp_path / ".pgpass").write_text("# host:port\n*:5432:*:me:from-pg-pass\n")
    (tmp_path / "token").write_text("odd-hub-token\n")
    known = known_secrets(
        {
            "HOME": str(tmp_path),
            "HF_TOKEN_PATH": str(tmp_path / "token"),
            "HTTPS_PROXY": "http://me:p%40ss-proxy@proxy:3128",
            "DSN": "postgresql://postgres:postgres@host/db",
            "MY_KEY_PASSPHRASE": 'quoted "phrase"',
            "PATH": "/bin",
        }
    )
    assert known == {
        "0123456789abcdef": ".netrc",
        "ghost-in-shell": ".git-credentials",
        "from-pg-pass": ".pgpass",
        "odd-hub-token": "token",
        "p@ss-proxy": "the password in the variable HTTPS_PROXY",
        "p%40ss-proxy": "the password in the variable HTTPS_PROXY",
        "p%2540ss-proxy": "the password in the variable HTTPS_PROXY",
        'quoted "phrase"': "the variable MY_KEY_PASSPHRASE",
        "quoted%20%22phrase%22": "the variable MY_KEY_PASSPHRASE",
        'quoted \\"phrase\\"': "the variable MY_KEY_PASSPHRASE",
    }
    (tmp_path / ".netrc").write_text("machine api.wandb.ai login user password another-password-now\n")
    assert "another-password-now" in known_secrets({"HOME": str(tmp_path)})


@given(st.text(st.characters(codec="ascii", exclude_categories=["Cc"]), min_size=8, max_size=40))
def test_the_value_of_a_secret_variable_survives_in_no_writing(value):
    secrets = sorted(known_secrets({"HOME": "/nowhere", "MY_TOKEN": value}), key=len, reverse=True)
    for written in (value, json.dumps(value), json.dumps({"a": [value]})):
        assert value not in without_credentials(f"<<{written}>>", secrets).replace(REDACTED, "")
        assert find_credential({"k": ["", f"<<{written}>>"]}, secrets) == "$.k[1]"


def test_a_secret_of_several_lines_is_found_by_each():
    known = known_secrets(
        {"HOME": "/nowhere", "SIGNING_PRIVATE_KEY": "-----BEGIN KEY-----\n" + "k" * 30 + "\nshort\n"}
    )
    assert find_secret(b"a\n" + b"k" * 30, known) == ("the value of the variable SIGNING_PRIVATE_KEY", 2)
    assert find_secret(b"short -----BEGIN KEY-----", known) is None


def test_a_token_in_a_file_is_found_whoever_it_belongs_to():
    content = b"a = 1\nb = '%b'" % HF.encode()
    assert find_secret(content, {}) == ("a token", 2)
    assert find_secret(content, {}, tokens=False) is None


def test_a_password_that_is_a_plain_word_refuses_no_file_that_has_the_word():
    known = known_secrets({"HOME": "/nowhere", "VPMOE_PG_PASSWORD": "postgres"})
    assert find_secret(b"import postgres", known) is None
    assert redact_text("password postgres", tuple(known)) == f"password {REDACTED}"


def raised(error, cause):
    try:
        try:
            raise cause
        except Exception as why:
            raise error from why
    except Exception as caught:
        return caught


def test_an_error_and_all_that_led_to_it_lose_their_credentials():
    url = "https://me:swordfish-9@host/x"
    command = ["git", "clone", url]
    chain = raised(
        RuntimeError("cannot clone", [url]), subprocess.CalledProcessError(128, command, output=url)
    )
    chain.add_note(f"while reading {url}")
    assert clean_error(chain, ())
    shown = "".join(
        str(part) for part in (chain.args, chain.__notes__, chain.__cause__, vars(chain.__cause__))
    )
    assert "swordfish" not in shown
    assert shown.count(REDACTED) >= 4
    assert str(chain.__cause__).startswith("Command '['git', 'clone', 'https://[redacted]@host/x']'")


def test_an_os_error_keeps_its_kind():
    error = FileNotFoundError(2, "No such file", "/home/https://me:swordfish-9@host")
    assert clean_error(error, ())
    assert (error.errno, error.filename) == (2, f"/home/https://{REDACTED}@host")


class StubbornError(Exception):
    def __str__(self) -> str:
        return "https://me:swordfish-9@host"


def test_an_error_that_cannot_be_altered_is_taken_out_of_the_chain():
    chain = raised(ValueError("why"), StubbornError())
    assert clean_error(chain, ())
    assert chain.__cause__ is None
    assert chain.__context__ is None
    assert not clean_error(StubbornError(), ())


def test_an_innocent_error_is_left_as_it_is():
    cause = URLError("token = none")
    error = raised(ValueError("why", 3), cause)
    assert clean_error(error, ())
    assert (error.args, error.__cause__, cause.reason) == (("why", 3), cause, "token = none")


def test_nothing_that_any_library_logs_holds_a_credential(monkeypatch, caplog):
    made = logging.getLogRecordFactory()
    monkeypatch.setattr(logging, "_logRecordFactory", getattr(made, "__wrapped__", made))
    monkeypatch.setenv("HTTPS_PROXY", "http://me:swordfish-9@proxy:3128")
    log_records.install()
    log_records.install()
    logger = logging.getLogger("some.library")
    logger.warning("HTTP Request: %s %s", "GET", "https://a:bcdef@host/x?token=0123456789")
    logger.warning("plain %s", "words")
    try:
        raise ValueError("cannot sign in by swordfish-9")
    except ValueError:
        logger.exception("failed")
    assert caplog.messages == [
        f"HTTP Request: GET https://{REDACTED}@host/x?token={REDACTED}",
        "plain words",
        "failed",
    ]
    assert "swordfish" not in caplog.text
    assert f"ValueError: cannot sign in by {REDACTED}" in caplog.text
    assert surroundings().startswith(f"HTTPS_PROXY=http://{REDACTED}@proxy:3128")
