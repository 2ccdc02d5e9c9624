"""Opens a checkpoint of either kind: a Hugging Face directory, or our published weights."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from trainer.checkpoints.format import CONFIG_NAME, SCHEMA
from trainer.contract.json_text import parse_json
from trainer.contract.schema.evaluate import Dtype, HuggingFaceCheckpoint, MegatronCheckpoint
from trainer.errors import EvaluationError
from trainer.evaluate.huggingface import HuggingFaceModel
from trainer.evaluate.megatron import MegatronModel
from trainer.evaluate.models import LanguageModel

_DTYPES: dict[Dtype, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def open_model(
    path: Path,
    *,
    name: str,
    device: str | torch.device = "cpu",
    dtype: Dtype = "fp32",
    expected: HuggingFaceCheckpoint | MegatronCheckpoint | None = None,
    tokenizer: Path | None = None,
    backend: str = "reference",
) -> LanguageModel:
    """Open a checkpoint of either kind.

    Args:
        path: Directory with a `config.json`.
        name: Object that it is.
        device: Where to put it.
        dtype: Type to compute in.
        expected: What the experiment says of it; a checkpoint that differs is refused.
        tokenizer: Directory of the o200k rank file; needed for our own checkpoints.
        backend: Backend of our own checkpoints.

    Raises:
        EvaluationError: It is neither kind, or differs from what is expected.
        PublishedError: See `trainer.evaluate.megatron.MegatronModel`.
    """
    device = torch.device(device)
    config = _read_config(path)
    if config.get("schema") == SCHEMA:
        if isinstance(expected, HuggingFaceCheckpoint):
            raise EvaluationError(
                f"{name}: a Hugging Face checkpoint is expected, {path} is a published one of ours"
            )
        if tokenizer is None:
            raise EvaluationError(
                f"{name}: {path} has token ids of o200k; give the input o200k_tokenizer to evaluate it"
            )
        return MegatronModel(
            name,
            path,
            device,
            _DTYPES[dtype],
            tokenizer=tokenizer,
            architecture=None if expected is None else expected.architecture,
            backend=backend,
        )
    if "model_type" not in config:
        raise EvaluationError(
            f"{path / CONFIG_NAME} has neither schema {SCHEMA!r} nor a model_type: not a known checkpoint"
        )
    if isinstance(expected, MegatronCheckpoint):
        raise EvaluationError(
            f"{name}: one of our published checkpoints is expected, {path} is a Hugging Face directory"
        )
    if expected is not None and expected.geometry is not None:
        _check_geometry(name, path, config, dict(expected.geometry))
    return HuggingFaceModel(name, path, device, _DTYPES[dtype])


def is_checkpoint(path: Path) -> bool:
    """Whether a directory holds weights of either kind."""
    return (path / CONFIG_NAME).is_file() and any(path.glob("*.safetensors"))


def _read_config(path: Path) -> dict[str, Any]:
    file = path / CONFIG_NAME
    try:
        config = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise EvaluationError(f"{path} holds no {CONFIG_NAME}: it is not a checkpoint") from None
    except ValueError as error:
        raise EvaluationError(f"{file} is not JSON: {error}") from error
    if not isinstance(config, dict):
        raise EvaluationError(f"{file} holds a {type(config).__name__}, not a table")
    return config


def _check_geometry(name: str, path: Path, config: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    found = {key: _lookup(config, key) for key in expected}
    wrong = [
        f"{key}: {found[key]!r} found, {expected[key]!r} expected"
        for key in sorted(expected)
        if found[key] != expected[key]
    ]
    if wrong:
        raise EvaluationError(
            f"{name}: {path / CONFIG_NAME} is not what the experiment says: {'; '.join(wrong)}"
        )


def _lookup(config: Mapping[str, Any], key: str) -> Any:
    """Return a value of a Hugging Face config; newer files keep the rotary base in a table of its own."""
    return next(_values(config, key), None)


def _values(config: Mapping[str, Any], key: str) -> Iterator[Any]:
    if key in config:
        yield config[key]
    for table in ("rope_parameters", "rope_scaling"):
        nested = config.get(table)
        if isinstance(nested, Mapping) and key in nested:
            yield nested[key]
