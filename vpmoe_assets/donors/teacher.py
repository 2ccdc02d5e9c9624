"""Teachers that are no checkpoint of this project: what says who answers, and whether it is the right one."""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.contract.files import replace_json
from trainer.contract.schema.sources import HubTeacher, ServerTeacher, TeacherSource
from trainer.contract.surroundings import surroundings
from vpmoe_assets.donors.checkpoints import CONFIG_NAME, read_config
from vpmoe_assets.donors.tokenizers import O200K_TOKENIZER_SHA256, TOKENIZER_NAME
from vpmoe_assets.errors import DonorError
from vpmoe_assets.lineage.digest import file_sha256

DESCRIPTOR_NAME = "teacher.json"
SCHEMA = "vpmoe.teacher/1"
_ANSWER_S = 5.0


def write_descriptor(source: ServerTeacher, tokenizer_sha256: str, directory: Path) -> dict[str, Any]:
    """Write what stands for a served teacher: who it is, never where.

    Args:
        source: Model, commit and reasoning mode; its pins are filled in.
        tokenizer_sha256: Of the ranks of the only token-id space.
        directory: The payload.

    Returns:
        What was written.
    """
    descriptor = {
        "schema": SCHEMA,
        "kind": "server",
        "model": source.model,
        "revision": source.revision,
        "reasoning_mode": source.reasoning_mode,
        "tokenizer_sha256": tokenizer_sha256,
    }
    directory.mkdir(parents=True, exist_ok=True)
    replace_json(directory / DESCRIPTOR_NAME, descriptor)
    return descriptor


def descriptor_faults(source: ServerTeacher, tokenizer_sha256: str, directory: Path) -> list[str]:
    """Return where a descriptor says something else than the experiment and its tokenizer."""
    path = directory / DESCRIPTOR_NAME
    try:
        found = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        return [f"{path}: cannot be read: {error}"]
    expected = {
        "model": source.model,
        "revision": source.revision,
        "reasoning_mode": source.reasoning_mode,
        "tokenizer_sha256": tokenizer_sha256,
    }
    return [
        f"{DESCRIPTOR_NAME}: {key} is {found.get(key)!r}, expected {value!r}"
        for key, value in expected.items()
        if found.get(key) != value
    ]


def vocabulary_faults(vocab_size: int, ranks: Mapping[bytes, int], directory: Path) -> list[str]:
    """Return where a published teacher's token ids are not the student's.

    Args:
        vocab_size: Rows that the student's head has.
        ranks: Ids of the student's tokens.
        directory: The payload.
    """
    try:
        rows = read_config(directory).get("vocab_size")
    except DonorError as error:
        return [str(error)]
    faults = []
    if rows != vocab_size:
        faults.append(f"{CONFIG_NAME}: vocab_size is {rows}, the student's is {vocab_size}")
    path = directory / TOKENIZER_NAME
    digest = file_sha256(path) if path.is_file() else "absent"
    if digest != O200K_TOKENIZER_SHA256:
        faults.append(f"{TOKENIZER_NAME}: sha256 {digest}, that of o200k Harmony is {O200K_TOKENIZER_SHA256}")
    else:
        ids = json.loads(path.read_bytes())["model"]["vocab"].values()
        if set(ids) != set(ranks.values()):
            faults.append(f"{TOKENIZER_NAME}: its {len(ids)} ids are not those of the {len(ranks)} ranks")
    return faults


def revision_faults(source: HubTeacher, manifest: Mapping[str, Any]) -> list[str]:
    """Return where what was fetched is of another repository or commit than the experiment's."""
    return [
        f"{key} is {manifest.get(key)!r}, the experiment says {value!r}"
        for key, value in (("repo", source.repo), ("revision", source.revision))
        if manifest.get(key) != value
    ]


def where(source: TeacherSource) -> dict[str, str]:
    """Return the keys of a job's `execution` by which it finds a served teacher; none for one at hand.

    Raises:
        DonorError: The experiment's environment variable is not set.
    """
    if not isinstance(source, ServerTeacher):
        return {}
    if not addresses(source.url_env):
        raise DonorError(
            f"sources.teacher.url_env: the environment variable {source.url_env} is not set; set it to the "
            f"address of the server of {source.model}, such as http://host:8000/v1 (several replicas apart "
            "by commas)"
        )
    return {"teacher_url_env": source.url_env}


def addresses(url_env: str) -> list[str]:
    """Return the addresses of the replicas that an environment variable holds, as written there."""
    return [part.rstrip("/") for part in re.split(r"[\s,]+", os.environ.get(url_env, "")) if part]


def silent(urls: Sequence[str], model: str) -> list[str]:
    """Return which replicas do not answer, or do not serve a model, each with what to do."""
    import httpx

    faults = []
    for url in urls:
        listing = f"{url}/models" if url.endswith("/v1") else f"{url}/v1/models"
        try:
            answer = httpx.get(listing, timeout=_ANSWER_S)
            answer.raise_for_status()
            served = [entry["id"] for entry in answer.json()["data"]]
        except (httpx.HTTPError, httpx.InvalidURL, ValueError, KeyError, TypeError) as error:
            faults.append(f"{listing}: {type(error).__name__}: {error}")
            continue
        except (ImportError, OSError) as error:  # before anything was asked: a proxy, a file of certificates
            faults.append(f"{listing}: {type(error).__name__}: {error}; check {surroundings()}")
            continue
        if model not in served:
            faults.append(f"{listing}: serves {', '.join(served) or 'nothing'}, not {model}")
    return faults
