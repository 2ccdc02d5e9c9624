"""Keys and values of a fixed number of slots, each a sequence of its own: tensors that never move.

A global layer has room for every position up to `capacity`, a local one for its window, position p in place
`p mod W`, as in `trainer.decoding.cache`, which makes what a slot begins with. A sequence that ends leaves
its keys behind; nobody sees them, as a token sees no more places than its sequence has filled.
"""

import torch
from torch import Tensor

from trainer.decoding.cache import DecodingCache
from trainer.model.attention import SelfAttention
from trainer.model.context import CachingCoreAttention
from trainer.model.document_mask import Documents
from trainer.model.gpt import VPGPTModel


class SlotCache:
    """What the sequences of the slots have left behind in each layer.

    Args:
        model: Whose layers they are.
        slots: B, sequences side by side.
        capacity: Positions of the longest.

    Attributes:
        positions: int64 `[B]`, of the tokens of the next step; whoever steps moves them.
        capacity: As given.
        layers: Keys and values of each layer, by its number, each `[B, groups, capacity or W, D]`.
    """

    def __init__(self, model: VPGPTModel, slots: int, capacity: int) -> None:
        self.capacity = capacity
        like = model.head_weight
        self.positions = torch.zeros(slots, dtype=torch.int64, device=like.device)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        for layer in model.decoder.layers:
            attention: SelfAttention = layer.self_attention
            window: int | None = attention.core_attention.window  # type: ignore[assignment]
            shape = (slots, attention.groups, capacity if window is None else window, attention.head_dim)
            self.layers[attention.layer_number] = like.new_zeros(shape), like.new_zeros(shape)

    def fill(self, slots: Tensor, source: DecodingCache, rows: Tensor) -> None:
        """Take over prompts that were run: row `rows[i]` of a cache into slot `slots[i]`.

        Args:
            slots: int64 `[n]`, each once.
            source: After one pass.
            rows: int64 `[n]`; several slots may take the same.
        """
        lengths = torch.tensor(source.lengths, dtype=torch.int64, device=rows.device)
        self.positions[slots] = lengths[rows]
        for number, *parts in source.layers():
            for target, part in zip(self.layers[number], parts, strict=True):
                target[slots, :, : part.shape[2]] = part[rows]

    def attend(
        self,
        layer_number: int,
        core: CachingCoreAttention,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        documents: Documents,
    ) -> Tensor:
        """Keep a layer's new key and value in every slot, and attend; see `KeyValueCache`."""
        return core.attend_slots(query, key, value, *self.layers[layer_number], self.positions)
