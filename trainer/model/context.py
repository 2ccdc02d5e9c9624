"""What every layer of one forward pass needs to know, built once; and what it asks of a cache.

The model knows a cache only as the protocols below; `trainer.decoding.cache` keeps one.
"""

from dataclasses import dataclass, field
from typing import Protocol

import torch

from trainer.model.document_mask import PADDING, Documents


class CachingCoreAttention(Protocol):
    """What a cache asks of a layer's core attention, whatever its backend.

    Attributes:
        window: Keys that the layer sees, the current token included; None: all.
    """

    window: int | None

    def __call__(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Attend within the pass: `[n, B, heads, D]` and `[n, B, groups, D]` twice to `[n, B, heads · D]`."""
        ...

    def attend_cached(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        distance: torch.Tensor,
        allowed: torch.Tensor,
    ) -> torch.Tensor:
        """Attend to kept keys; see `trainer.model.core_attention.ReferenceCoreAttention`."""
        ...

    def attend_slots(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Keep a key and a value and attend; see `trainer.model.core_attention.ReferenceCoreAttention`."""
        ...


class KeyValueCache(Protocol):
    """What a layer asks of a cache: to keep its new keys and values, and to attend to all it has seen."""

    def attend(
        self,
        layer_number: int,
        core: CachingCoreAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: Documents,
    ) -> torch.Tensor:
        """Attend.

        Args:
            layer_number: 1-based.
            core: The layer's core attention.
            query: `[n, B, heads, D]`, rotated.
            key: `[n, B, groups, D]`, rotated.
            value: `[n, B, groups, D]`, mixed with layer 1's.
            documents: Of the pass; `doc_id` `[B, n]`, 0 for tokens and -1 for padding.

        Returns:
            `[n, B, heads · D]`.
        """
        ...


@dataclass
class ForwardContext:
    """State of one forward pass; it travels in the `attention_mask` argument of Megatron's layers.

    Masks are derived from `documents` where scores are computed (`trainer.model.document_mask`); an `[S, S]`
    tensor is never passed from layer to layer. A new object for each pass keeps two passes (or a pass and its
    backward) from sharing state.

    Attributes:
        documents: Which document each token belongs to.
        position_ids: int64 `[B, S]`, position inside the document.
        rotation: fp32 `(cos, sin)`, each `[S, B, 1 or heads, D/2]`, or None when no layer rotates.
        first_value: Layer 1's values `[S, B, groups, D]` once layer 1 has run; not detached.
        cache: Keys and values of earlier tokens, which this pass continues; None in training.
    """

    documents: Documents
    position_ids: torch.Tensor
    rotation: tuple[torch.Tensor, torch.Tensor] | None = None
    first_value: torch.Tensor | None = field(default=None, repr=False)
    cache: KeyValueCache | None = field(default=None, repr=False)

    @property
    def padding(self) -> torch.Tensor:
        """Bool `[B, S]`, True where a token is padding."""
        return self.documents.doc_id == PADDING


def forward_context(
    tokens: torch.Tensor,
    position_ids: torch.Tensor,
    documents: Documents,
    *,
    max_sequence_length: int,
) -> ForwardContext:
    """Check the three inputs of a forward pass and start its context.

    Raises:
        ValueError: A shape or dtype is wrong, or a row is longer than the model allows.
    """
    doc_id = documents.doc_id
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
    return ForwardContext(documents, position_ids)
