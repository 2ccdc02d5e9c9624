"""Keys and values of earlier tokens, so that the next token costs one position instead of the whole prefix.

A global layer keeps every position; a local layer keeps the last W in a ring, position p in slot `p mod W`.
Keys are kept rotated and values mixed with layer 1's: both depend on their own position alone, so nothing
else of the past is needed, layer 1's values included (the pass that makes a value has layer 1's at hand). TPA
composes keys and values before they get here; at the ranks in use its factors would be no smaller.

Rows of a batch are sequences of their own with lengths of their own. A row's position is its number of
tokens: prompts are padded on the right, and padding is never kept.

    cache = DecodingCache(rows=2)
    logits = next_logits(model, cache, prompts, counts=[5, 9])      # prefill, [2, V]
    logits = next_logits(model, cache, logits.argmax(-1)[:, None])  # one step
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist

from trainer.model.context import CachingCoreAttention
from trainer.model.document_mask import PADDING, Documents, within_reach
from trainer.model.gpt import VPGPTModel


@dataclass(frozen=True)
class _Pass:
    """The tokens that one forward pass adds.

    Attributes:
        starts: int64 `[B, 1]`, tokens of each row before the pass.
        ends: int64 `[B, 1]`, and after it.
        positions: int64 `[B, n]`, of the new tokens, padding counted on.
        fresh: The cache was empty.
        reach: No position of the pass is this large or larger.
    """

    starts: torch.Tensor
    ends: torch.Tensor
    positions: torch.Tensor
    fresh: bool
    reach: int

    @property
    def single(self) -> bool:
        """Whether every row adds exactly one token."""
        return self.positions.shape[1] == 1


@dataclass(frozen=True)
class _Mask:
    """Distance `[B, n, m]` from query to key, and whether it is seen; the same for layers of a kind."""

    distance: torch.Tensor
    allowed: torch.Tensor


class DecodingCache:
    """What a batch of sequences has left behind in each layer.

    Made empty and without a model; storage appears with the first pass, in the dtype and on the device of the
    keys. Not differentiable. A batch that came through a failed pass is refused afterwards.

    Args:
        rows: Number of sequences.
        reserve: Positions to make room for at once in global layers; more are made when needed.
    """

    def __init__(self, rows: int, *, reserve: int = 0) -> None:
        if rows < 1:
            raise ValueError(f"rows = {rows}: a cache holds at least one sequence")
        self.reserve = reserve
        self._lengths = [0] * rows
        self._layers: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}  # each [B, groups, slots, D]
        self._masks: dict[int | None, _Mask] = {}
        self._pass: _Pass | None = None

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each row so far."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes held."""
        return sum(part.numel() * part.element_size() for layer in self._layers.values() for part in layer)

    def layers(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield number, keys and values of each layer, `[B, groups, slots, D]`, as they are kept."""
        for number, (keys, values) in self._layers.items():
            yield number, keys, values

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows, in this order; a row may be named more than once (samples of one prompt).

        Args:
            rows: Indices, at least one.
        """
        if not rows:
            raise ValueError("select() needs at least one row")
        self._lengths = [self._lengths[row] for row in rows]
        for number, (keys, values) in self._layers.items():
            index = torch.tensor(rows, dtype=torch.int64, device=keys.device)
            self._layers[number] = (keys.index_select(0, index), values.index_select(0, index))

    def begin(self, width: int, counts: Sequence[int], limit: int, device: torch.device) -> torch.Tensor:
        """Announce a pass of `[B, width]` tokens, of which row b brings `counts[b]` and then padding.

        Args:
            width: Tokens a row, padding included.
            counts: Real tokens of each row, 1 to `width`.
            limit: Longest row the model allows.
            device: Of the model.

        Returns:
            int64 `[B, width]`, the position of each token.

        Raises:
            ValueError: Counts do not fit the cache or the width, or a row would grow past the limit.
            RuntimeError: An earlier pass failed half-way.
        """
        if self._pass is not None:
            raise RuntimeError("an earlier pass over this cache failed half-way; prefill a new one")
        if len(counts) != len(self._lengths) or not all(1 <= count <= width for count in counts):
            raise ValueError(
                f"counts = {list(counts)}: expected one number from 1 to {width} for each of the cache's "
                f"{len(self._lengths)} rows"
            )
        ends = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        if max(ends) > limit:
            raise ValueError(
                f"row {ends.index(max(ends))} would have {max(ends)} tokens, but "
                f"attention.max_sequence_length = {limit}"
            )
        starts = torch.tensor(self._lengths, dtype=torch.int64, device=device)[:, None]
        positions = starts + torch.arange(width, device=device)
        self._pass = _Pass(
            starts,
            torch.tensor(ends, dtype=torch.int64, device=device)[:, None],
            positions,
            fresh=not any(self._lengths),
            reach=max(self._lengths) + width,
        )
        self._masks = {}
        return positions

    def commit(self) -> None:
        """End the pass: its tokens belong to the past now."""
        assert self._pass is not None
        self._lengths = self._pass.ends[:, 0].tolist()
        self._pass = None

    def attend(
        self,
        layer_number: int,
        core: CachingCoreAttention,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        documents: Documents,
    ) -> torch.Tensor:
        """Keep a layer's new keys and values, and attend to all it has seen; see `KeyValueCache`."""
        now = self._pass
        if now is None:
            raise RuntimeError(
                "a cache is advanced by trainer.decoding.cache.extend, which announces each pass"
            )
        new = key.permute(1, 2, 0, 3), value.permute(1, 2, 0, 3)  # [B, groups, n, D]
        seen: tuple[torch.Tensor, torch.Tensor]
        if core.window is None:
            stored = self._global_storage(layer_number, now, new[0])
            _put(stored, new, now.positions)
            seen = stored[0][:, :, : now.reach], stored[1][:, :, : now.reach]
        elif now.single:
            seen = self._ring(layer_number, core.window, new[0])
            _put(seen, new, now.positions % core.window)
        else:
            seen = new
            if not now.fresh:
                keys, values = self._layers[layer_number]
                seen = torch.cat((keys, new[0]), dim=2), torch.cat((values, new[1]), dim=2)
            self._layers[layer_number] = _last_of(seen, now, core.window)
        if now.fresh:  # nothing but this pass to see: the ordinary forward
            return core(query, key, value, documents)
        mask = self._masks.get(core.window)
        if mask is None:
            mask = self._masks[core.window] = _mask(now, core.window)
        return core.attend_cached(query, *seen, mask.distance, mask.allowed)

    def _global_storage(
        self, layer_number: int, now: _Pass, like: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        stored = self._layers.get(layer_number)
        slots = 0 if stored is None else stored[0].shape[2]
        if stored is None or slots < now.reach:
            batch, groups, _, dim = like.shape
            shape = (batch, groups, max(now.reach, self.reserve, slots + slots // 2), dim)
            grown = like.new_zeros(shape), like.new_zeros(shape)
            if stored is not None:
                grown[0][:, :, :slots], grown[1][:, :, :slots] = stored
            stored = self._layers[layer_number] = grown
        return stored

    def _ring(self, layer_number: int, window: int, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if layer_number not in self._layers:
            batch, groups, _, dim = like.shape
            shape = (batch, groups, window, dim)
            self._layers[layer_number] = like.new_zeros(shape), like.new_zeros(shape)
        return self._layers[layer_number]


def _put(
    stored: tuple[torch.Tensor, torch.Tensor], new: tuple[torch.Tensor, torch.Tensor], slots: torch.Tensor
) -> None:
    """Write `new[b, :, i]` into `stored[b, :, slots[b, i]]`, in place."""
    rows = torch.arange(slots.shape[0], device=slots.device)[:, None]
    for target, source in zip(stored, new, strict=True):
        target[rows, :, slots] = source.transpose(1, 2)


def _ring_positions(end: torch.Tensor, window: int) -> torch.Tensor:
    """Int64 `[B, W]`: the position in each slot once `end` `[B, 1]` tokens are seen; negative: none."""
    last = end - 1
    return last - (last - torch.arange(window, device=end.device)) % window


def _last_of(
    seen: tuple[torch.Tensor, torch.Tensor], now: _Pass, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ring after a pass: the ring before it (unless fresh), then the pass's own tokens."""
    wanted = _ring_positions(now.ends, window)
    own = (0 if now.fresh else window) + wanted - now.starts
    kept = torch.arange(window, device=own.device)
    index = torch.where(wanted >= now.starts, own, kept.clamp(max=seen[0].shape[2] - 1))
    keys, values = (
        part.gather(2, index[:, None, :, None].expand(-1, part.shape[1], -1, part.shape[3])) for part in seen
    )
    return keys, values


def _mask(now: _Pass, window: int | None) -> _Mask:
    if window is None:
        keys = torch.arange(now.reach, device=now.positions.device)[None, :]
    elif now.single:
        keys = _ring_positions(now.ends, window)
    else:
        keys = torch.cat((_ring_positions(now.starts, window), now.positions), dim=1)
    distance = now.positions[:, :, None] - keys[:, None, :]
    # Slots behind a row's end hold padding or nothing; causality hides them, as their positions are to come.
    return _Mask(distance, within_reach(distance, window) & (keys >= 0)[:, None, :])


@torch.no_grad()
def extend(
    model: VPGPTModel, cache: DecodingCache, tokens: torch.Tensor, counts: Sequence[int] | None = None
) -> torch.Tensor:
    """Run new tokens after those that the cache has seen; the same hidden states as running the whole rows.

    Args:
        model: Best in evaluation mode; in training mode nothing is counted or learned either, for want of
            gradients.
        cache: Advanced by the tokens.
        tokens: int64 `[B, n]`, n ≥ 1, padded on the right.
        counts: Tokens of each row without padding; all n by default.

    Returns:
        `[n, B, H]` after the final norm; meaningless where padded.

    Raises:
        ValueError: Shapes or counts do not fit, or a row would grow longer than the model allows.
    """
    if tokens.dim() != 2 or not tokens.shape[1]:
        raise ValueError(f"tokens: expected int64 [B, n] with n ≥ 1, found {list(tokens.shape)}")
    batch, width = tokens.shape
    counts = [width] * batch if counts is None else list(counts)
    positions = cache.begin(width, counts, model.max_sequence_length, tokens.device)
    doc_id = torch.zeros_like(tokens)
    if min(counts) < width:
        doc_id[positions >= positions[:, :1] + torch.tensor(counts, device=tokens.device)[:, None]] = PADDING
    hidden = model.forward_hidden(tokens, positions, doc_id, cache)
    cache.commit()
    return hidden


@torch.no_grad()
def next_logits(
    model: VPGPTModel, cache: DecodingCache, tokens: torch.Tensor, counts: Sequence[int] | None = None
) -> torch.Tensor:
    """Like `extend`, through the head: the logits that follow each row's last token.

    Returns:
        fp32 `[B, V]`, the whole vocabulary on every tensor-parallel rank.
    """
    hidden = extend(model, cache, tokens, counts)
    last = [hidden.shape[0] - 1] * hidden.shape[1] if counts is None else [count - 1 for count in counts]
    rows = torch.arange(hidden.shape[1], device=hidden.device)
    return head_logits(model, hidden[torch.tensor(last, device=hidden.device), rows])


def head_logits(model: VPGPTModel, hidden: torch.Tensor) -> torch.Tensor:
    """Logits of final hidden states `[B, H]`: fp32 `[B, V]`, all of them on every tensor-parallel rank."""
    weight = model.head_weight
    if weight.device.type == "cuda" and weight.dtype != torch.float32:
        # Rounding the logits would make ties between the likeliest tokens and blur their probabilities.
        logits = torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    else:  # on a CPU that would cost a copy of the head in fp32
        logits = torch.nn.functional.linear(hidden, weight).float()
    group = model.pg_collection.tp
    if group.size() > 1:
        parts = [torch.empty_like(logits) for _ in range(group.size())]
        dist.all_gather(parts, logits, group=group)
        logits = torch.cat(parts, dim=1)
    return logits
