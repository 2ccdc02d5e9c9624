"""What every layer of one forward pass needs to know, built once."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from trainer.decoding.cache import DecodingCache

PADDING = -1


@dataclass
class ForwardContext:
    """State of one forward pass; it travels in the `attention_mask` argument of Megatron's layers.

    Masks are derived from `doc_id` and from indices where scores are computed; an `[S, S]` tensor is
    never passed from layer to layer. A new object for each pass keeps two passes (or a pass and its backward)
    from sharing state.

    Attributes:
        doc_id: int64 `[B, S]`, document of each token; -1 marks padding, which sees itself only.
        position_ids: int64 `[B, S]`, position inside the document.
        rotation: fp32 `(cos, sin)`, each `[S, B, 1 or heads, D/2]`, or None when no layer rotates.
        first_value: Layer 1's values `[S, B, groups, D]` once layer 1 has run; not detached.
        cache: Keys and values of earlier tokens, which this pass continues; None in training.
    """

    doc_id: torch.Tensor
    position_ids: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    first_value: torch.Tensor | None = field(default=None, repr=False)
    cache: "DecodingCache | None" = field(default=None, repr=False)

    @property
    def padding(self) -> torch.Tensor:
        """Bool `[B, S]`, True where a token is padding."""
        return self.doc_id == PADDING


def forward_context(
    tokens: torch.Tensor, position_ids: torch.Tensor, doc_id: torch.Tensor, *, max_sequence_length: int
) -> ForwardContext:
    """Check the three inputs of a forward pass and start its context.

    Raises:
        ValueError: A shape or dtype is wrong, or a row is longer than the model allows.
    """
    for name, tensor in (("tokens", tokens), ("position_ids", position_ids), ("doc_id", doc_id)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 2 or tensor.dtype != torch.int64:
            found = (
                f"{tensor.dtype} {list(tensor.shape)}" if isinstance(tensor, torch.Tensor) else repr(tensor)
            )
            raise ValueError(f"{name}: expected an int64 tensor [B, S], found {found}")
        if tensor.shape != tokens.shape:
            raise ValueError(
                f"{name}: expected the shape of tokens, {list(tokens.shape)}, found {list(tensor.shape)}; "
                "documents are always isolated, so every row needs its doc_id and position_ids"
            )
    if tokens.shape[1] > max_sequence_length:
        raise ValueError(
            f"a row has {tokens.shape[1]} tokens, but attention.max_sequence_length = {max_sequence_length}"
        )
    return ForwardContext(doc_id=doc_id, position_ids=position_ids)
