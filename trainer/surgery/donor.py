"""The Hugging Face donor: which configuration and tensors it must have."""

from collections.abc import Mapping
from typing import Any

import torch

from trainer.checkpoint_format import CONFIG_NAME
from trainer.config import Donor
from trainer.surgery.tensorfile import TensorSpec, WeightsError
from trainer.surgery.weights import WeightsReader, differences

HF_EMBEDDING = "model.embed_tokens.weight"
HF_HEAD = "lm_head.weight"
HF_FINAL_NORM = "model.norm.weight"
HF_LAYER = "model.layers.{}."
"""Prefix of a layer's tensors; the index counts from 0."""


def donor_table(donor: Donor, dtype: torch.dtype) -> dict[str, TensorSpec]:
    """Name and shape of every tensor of a Qwen3 checkpoint; a tied head is not among them.

    Args:
        donor: its geometry.
        dtype: type of all tensors.
    """
    hidden, width, dim = donor.hidden_size, donor.intermediate_size, donor.head_dim
    queries, pairs = donor.num_attention_heads * dim, donor.num_key_value_heads * dim
    shapes: dict[str, tuple[int, ...]] = {
        HF_EMBEDDING: (donor.vocab_size, hidden),
        HF_FINAL_NORM: (hidden,),
    }
    if not donor.tie_word_embeddings:
        shapes[HF_HEAD] = (donor.vocab_size, hidden)
    for layer in range(donor.num_layers):
        inside: dict[str, tuple[int, ...]] = {
            "input_layernorm": (hidden,),
            "post_attention_layernorm": (hidden,),
            "self_attn.q_proj": (queries, hidden),
            "self_attn.k_proj": (pairs, hidden),
            "self_attn.v_proj": (pairs, hidden),
            "self_attn.o_proj": (hidden, queries),
            "self_attn.q_norm": (dim,),
            "self_attn.k_norm": (dim,),
            "mlp.gate_proj": (width, hidden),
            "mlp.up_proj": (width, hidden),
            "mlp.down_proj": (hidden, width),
        }
        shapes |= {f"{HF_LAYER.format(layer)}{name}.weight": shape for name, shape in inside.items()}
    return {name: TensorSpec(shape, dtype) for name, shape in shapes.items()}


def require_donor(reader: WeightsReader, donor: Donor) -> None:
    """Refuse a checkpoint whose configuration or tensors are not the donor's.

    A tied head that is stored although it is the embedding is accepted when it really is the embedding.

    Raises:
        WeightsError: naming each key or tensor, what was expected and what was found.
    """
    config = reader.config
    keys = {"num_layers": "num_hidden_layers"}
    expected = {
        keys.get(name, name): getattr(donor, name) for name in Donor.model_fields if name != "rope_theta"
    } | {"rope_theta": donor.rope_theta, "hidden_act": "silu", "attention_bias": False}
    found = {key: config.get(key) for key in expected} | {"rope_theta": rope_theta(config)}
    if wrong := differences(expected, found):
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
    """Base of the rotary embedding, where older and newer configurations keep it; None if they do not."""
    newer = config.get("rope_parameters") or {}
    value = config.get("rope_theta", newer.get("rope_theta"))
    return None if value is None else float(value)
