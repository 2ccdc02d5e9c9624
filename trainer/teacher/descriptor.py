"""`teacher.json`: what stands in a teacher's payload when its weights are served elsewhere."""

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from trainer.errors import TeacherError

DESCRIPTOR_NAME = "teacher.json"
SCHEMA = "vpmoe.teacher/1"
URL_ENV = "VPMOE_TEACHER_URL"
KEY_ENV = "VPMOE_TEACHER_KEY"
"""Variables that are read where the descriptor names no others."""

_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")


@dataclass(frozen=True)
class Descriptor:
    """A served model.

    Attributes:
        model: Its name on the server.
        revision: Commit of the weights; what it says is believed, no server tells.
        reasoning_mode: Mode that it is asked in.
        tokenizer_sha256: Of the tokenizer that its token ids are of.
        url_env: Environment variable with the addresses of its replicas, apart by commas or blanks.
        key_env: Environment variable with the key that the server wants, if any. It is sent and never
            written anywhere.
    """

    model: str
    revision: str
    reasoning_mode: str
    tokenizer_sha256: str
    url_env: str = URL_ENV
    key_env: str = KEY_ENV

    def urls(self, environment: Mapping[str, str] | None = None) -> list[str]:
        """Return the addresses of the replicas.

        Raises:
            TeacherError: The variable is not set or holds something else.
        """
        text = (os.environ if environment is None else environment).get(self.url_env, "")
        urls = [url.rstrip("/") for url in re.split(r"[,\s]+", text) if url]
        if not urls:
            raise TeacherError(
                f"environment variable {self.url_env} is not set: give the address of the server of "
                f"{self.model}, such as http://host:8000/v1 (several replicas apart by commas)"
            )
        if wrong := [url for url in urls if not re.match(r"https?://[^/]", url)]:
            raise TeacherError(
                f"{self.url_env}: {len(wrong)} of {len(urls)} addresses do not begin with http:// or https://"
            )
        return urls

    def key(self, environment: Mapping[str, str] | None = None) -> str | None:
        """Return the server's key, None where there is none."""
        return (os.environ if environment is None else environment).get(self.key_env) or None


def read_descriptor(path: Path) -> Descriptor:
    """Read a `teacher.json`.

    Its keys are `schema`, `kind` (`server`), `model`, `revision`, `reasoning_mode`, `tokenizer_sha256`, and
    optionally `execution` with `url_env` and `key_env`, names of environment variables.

    Raises:
        TeacherError: It is missing, damaged, or lacks a key.
    """
    try:
        document: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        execution = document.get("execution", {})
        found = (document["schema"], document["kind"])
        names = ("model", "revision", "reasoning_mode", "tokenizer_sha256")
        said = {name: document[name] for name in names} | {
            name: execution[name] for name in ("url_env", "key_env") if name in execution
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise TeacherError(
            f"{path} describes no teacher ({type(error).__name__}: {error}); make the asset teacher again"
        ) from error
    if found != (SCHEMA, "server"):
        raise TeacherError(f"{path}: schema and kind are {found}, expected {(SCHEMA, 'server')}")
    if wrong := [name for name, value in said.items() if not isinstance(value, str) or not value]:
        raise TeacherError(f"{path}: {', '.join(wrong)} must be a text that is not empty")
    for name in ("url_env", "key_env"):
        if name in said and not _NAME.fullmatch(said[name]):
            raise TeacherError(f"{path}: execution.{name} is the name of an environment variable, no address")
    return Descriptor(**said)
