"""Weights & Biases settings of a job: offline unless asked, and the key in no file of ours."""

import netrc
import os
from collections.abc import Mapping
from typing import Literal
from urllib.parse import urlsplit

WandbMode = Literal["offline", "online", "disabled"]
KEY_ENV = "WANDB_API_KEY"


class WandbKeyMissingError(RuntimeError):
    """Online tracking was asked for and there is no API key to sign in with."""


def wandb_environment(mode: WandbMode, environment: Mapping[str, str]) -> dict[str, str]:
    """Return the environment of a job with respect to Weights & Biases.

    The key is handed on in the environment, and only to a job that is to use it: it is never part of
    `job.json`, a record or a log.

    Args:
        mode: What the job was asked to do.
        environment: The whole environment of this process.

    Returns:
        `environment` with `WANDB_MODE` set to `mode`, and without the key unless `mode` is "online".

    Raises:
        WandbKeyMissingError: `mode` is "online", and neither environment nor netrc has a key for the server;
            or its address is none.
    """
    if mode == "online":
        url = environment.get("WANDB_BASE_URL") or "https://api.wandb.ai"
        try:
            host = urlsplit(url).hostname or ""
        except ValueError as error:
            raise WandbKeyMissingError(f"WANDB_BASE_URL = {url} is no address ({error})") from error
        if not environment.get(KEY_ENV) and (missing := _missing_in_netrc(host)) is not None:
            raise WandbKeyMissingError(
                f'wandb = "online" was asked for, and there is no API key for {host}: neither {KEY_ENV} nor '
                f"netrc has one{missing}. Run `wandb login`, set the variable, or use "
                'wandb = "offline" and later `wandb sync`.'
            )
        return {**environment, "WANDB_MODE": mode}
    return {**{name: value for name, value in environment.items() if name != KEY_ENV}, "WANDB_MODE": mode}


def _missing_in_netrc(host: str) -> str | None:
    """Return None where netrc has a key for the host, else the reason why it could not be read, if any."""
    path = os.environ.get("NETRC")
    try:
        return None if netrc.netrc(path).authenticators(host) is not None else ""
    except FileNotFoundError:
        return ""
    except (OSError, netrc.NetrcParseError, UnicodeDecodeError) as error:
        return f" ({path or 'netrc'} cannot be read: {error})"
