"""Weights & Biases: offline by default, and the key goes only where it is used."""

from pathlib import Path

import pytest

from vpmoe_assets.resources.tracking import WandbKeyMissingError, wandb_environment


@pytest.fixture(autouse=True)
def no_netrc(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "netrc"
    monkeypatch.setenv("NETRC", str(path))
    return path


@pytest.mark.parametrize("mode", ["offline", "disabled"])
def test_a_job_that_does_not_upload_gets_no_key(mode) -> None:
    environment = wandb_environment(mode, {"WANDB_API_KEY": "secret", "WANDB_MODE": "online", "PATH": "/bin"})
    assert environment == {"WANDB_MODE": mode, "PATH": "/bin"}


def test_an_online_job_gets_the_key() -> None:
    environment = wandb_environment("online", {"WANDB_API_KEY": "secret"})
    assert environment == {"WANDB_MODE": "online", "WANDB_API_KEY": "secret"}


def test_online_without_a_key_is_refused_with_a_remedy() -> None:
    with pytest.raises(WandbKeyMissingError, match=r"no API key for api\.wandb\.ai.*wandb login"):
        wandb_environment("online", {})


def test_the_key_of_the_right_server_in_netrc_is_enough(no_netrc: Path) -> None:
    no_netrc.write_text("machine wandb.example login user password secret\n")
    no_netrc.chmod(0o600)
    assert wandb_environment("online", {"WANDB_BASE_URL": "https://wandb.example"})["WANDB_MODE"] == "online"
    with pytest.raises(WandbKeyMissingError):
        wandb_environment("online", {})


@pytest.mark.parametrize("broken", ["directory", "no text", "no netrc"])
def test_a_netrc_that_cannot_be_read_is_named_and_none_where_the_variable_has_the_key(no_netrc, broken):
    if broken == "directory":
        no_netrc.mkdir()
    else:
        no_netrc.write_bytes(b"\xff" if broken == "no text" else b"machine")
        no_netrc.chmod(0o600)
    with pytest.raises(WandbKeyMissingError, match=rf"{no_netrc} cannot be read"):
        wandb_environment("online", {})
    assert wandb_environment("online", {"WANDB_API_KEY": "secret"})["WANDB_MODE"] == "online"


def test_a_server_without_an_address_is_named():
    with pytest.raises(WandbKeyMissingError, match=r"WANDB_BASE_URL = http://\[ is no address"):
        wandb_environment("online", {"WANDB_BASE_URL": "http://[", "WANDB_API_KEY": "secret"})
