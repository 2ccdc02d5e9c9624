"""The dense donor's geometry."""

from typing import Literal, Self

from pydantic import model_validator

from trainer.contract.schema.base import Frozen, PositiveFloat, PositiveInt


class Donor(Frozen):
    """Geometry of a Hugging Face donor; one that differs is refused before any work."""

    model_type: Literal["qwen3"]
    num_layers: PositiveInt
    hidden_size: PositiveInt
    num_attention_heads: PositiveInt
    num_key_value_heads: PositiveInt
    head_dim: PositiveInt
    intermediate_size: PositiveInt
    vocab_size: PositiveInt
    tie_word_embeddings: bool
    rope_theta: PositiveFloat
    rms_norm_eps: PositiveFloat

    @model_validator(mode="after")
    def _check_heads(self) -> Self:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"num_attention_heads = {self.num_attention_heads} is not a multiple of "
                f"num_key_value_heads = {self.num_key_value_heads}"
            )
        return self
