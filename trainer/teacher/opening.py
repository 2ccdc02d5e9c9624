"""Opens a teacher's payload: weights of ours, weights of `transformers`, or where it is served."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.format import CONFIG_NAME, SCHEMA
from trainer.contract.json_text import parse_json
from trainer.contract.schema.evaluate import Dtype
from trainer.errors import TeacherError
from trainer.teacher.checkpoint import CheckpointTeacher
from trainer.teacher.descriptor import DESCRIPTOR_NAME, read_descriptor
from trainer.teacher.files_digest import files_digest
from trainer.teacher.journal import JournalledTeacher
from trainer.teacher.local import local_identity
from trainer.teacher.server import ServerTeacher, served_identity
from trainer.teacher.teacher import Teacher
from trainer.teacher.transformers_teacher import TransformersTeacher

_DTYPES: Mapping[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_teacher(
    path: Path,
    *,
    digest: str | None = None,
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    backend: str = "reference",
    batch_tokens: int | None = None,
    journal: Path | None = None,
    url_env: str | None = None,
) -> Teacher:
    """Open a teacher.

    Args:
        path: Its payload: `teacher.json` of a served one, or a checkpoint of ours or of `transformers`.
        digest: Content digest of the payload; taken from the files by default, which reads them all.
        device: Where weights are put.
        dtype: Type that weights compute in.
        backend: Backend of our own checkpoints.
        batch_tokens: Most positions of a batch of a local teacher.
        journal: Keeps a served teacher's answers, so that they are the same after a restart. A local one
            gives the same bits by itself and has no use for it.
        url_env: Environment variable with the addresses of a served one, instead of the descriptor's.

    Raises:
        TeacherError: It is none of these, or a server that cannot be reached.
        EvaluationError, PublishedError: A checkpoint cannot be opened.
    """
    if (path / DESCRIPTOR_NAME).is_file():
        descriptor = read_descriptor(path / DESCRIPTOR_NAME)
        if url_env is not None:
            descriptor = replace(descriptor, url_env=url_env)
        served = ServerTeacher(descriptor, descriptor.urls(), key=descriptor.key())
        return served if journal is None else JournalledTeacher(served, journal)
    kind = _kind(path)
    digest = digest or files_digest(path)
    device = torch.device(device)
    if kind is CheckpointTeacher:
        return CheckpointTeacher(
            path,
            digest=digest,
            device=device,
            dtype=_DTYPES[dtype],
            backend=backend,
            batch_tokens=batch_tokens,
        )
    return TransformersTeacher(
        path, digest=digest, device=device, dtype=_DTYPES[dtype], batch_tokens=batch_tokens
    )


def teacher_identity(path: Path, *, digest: str, dtype: Dtype) -> dict[str, Any]:
    """Return what `Teacher.identity` of a payload will be, without opening it.

    Args:
        path: Its payload.
        digest: Content digest of the payload.
        dtype: Type that weights will compute in.

    Raises:
        TeacherError: It is no teacher.
    """
    if (path / DESCRIPTOR_NAME).is_file():
        return served_identity(read_descriptor(path / DESCRIPTOR_NAME))
    return local_identity(_kind(path).kind, digest, _DTYPES[dtype])


def _kind(path: Path) -> type[CheckpointTeacher] | type[TransformersTeacher]:
    config = _config(path)
    if config.get("schema") == SCHEMA:
        return CheckpointTeacher
    if "model_type" in config:
        return TransformersTeacher
    raise TeacherError(
        f"{path / CONFIG_NAME} has neither schema {SCHEMA!r} nor a model_type: not a known checkpoint"
    )


def _config(path: Path) -> dict[str, object]:
    try:
        config = parse_json((path / CONFIG_NAME).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise TeacherError(
            f"{path} holds neither {DESCRIPTOR_NAME} nor {CONFIG_NAME}: it is no teacher; give the payload "
            "of the asset teacher, or a checkpoint"
        ) from None
    except ValueError as error:
        raise TeacherError(f"{path / CONFIG_NAME} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise TeacherError(f"{path / CONFIG_NAME} holds a {type(config).__name__}, not a table")
    return config
