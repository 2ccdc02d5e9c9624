"""The Hugging Face donor: which configuration and tensors it must have."""

from collections.abc import Mapping
from typing import Any

import torch

from trainer.checkpoints.format import CONFIG_NAME
from trainer.contract.donor import HF_EMBEDDING, HF_HEAD, donor_shapes
from trainer.contract.schema.donor import Donor
from trainer.surgery.tensorfile import TensorSpec, WeightsError
from trainer.surgery.weights import WeightsReader, shown_differences


def donor_table(donor: Donor, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Every tensor of a Qwen3 checkpoint; a tied head is not among them.

    Args:
        donor: Its geometry.
        dtype: Type of all tensors.
    """
    return {name: TensorSpec(shape, dtype) for name, shape in donor_shapes(donor).items()}


def require_donor(reader: WeightsReader, donor: Donor) -> None:
    """Refuse a checkpoint whose configuration or tensors are not the donor's.

    A tied head that is stored although it is the embedding is accepted when it really is the embedding.

    Raises:
        WeightsError: Naming each key or tensor, what was expected and what was found.
    """
    config = reader.config
    keys = {"num_layers": "num_hidden_layers"}
    expected = {
        keys.get(name, name): getattr(donor, name) for name in Donor.model_fields if name != "rope_theta"
    } | {"rope_theta": donor.rope_theta, "hidden_act": "silu", "attention_bias": False}
    found = {key: config.get(key) for key in expected} | {"rope_theta": rope_theta(config)}
    if wrong := shown_differences(expected, found):
        raise WeightsError(f"{reader.directory / CONFIG_NAME} is not the donor of the recipe: {wrong}")
    table = donor_table(donor, torch.bfloat16)
    if donor.tie_word_embeddings and HF_HEAD in reader:
        if reader.digest(HF_HEAD) != reader.digest(HF_EMBEDDING):
            raise WeightsError(
                f"{reader.directory}: {HF_HEAD} and {HF_EMBEDDING} differ, but the configuration ties them"
            )
        table[HF_HEAD] = table[HF_EMBEDDING]
    reader.require(table, any_dtype=True)


def rope_theta(config: Mapping[str, Any]) -> float | None:
    """Return the base of the rotary embedding, as older and newer configurations keep it, or None."""
    newer = config.get("rope_parameters") or {}
    value = config.get("rope_theta", newer.get("rope_theta"))
    return None if value is None else float(value)
