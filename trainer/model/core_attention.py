"""Scores, mask, softmax with a sink, and the weighted sum of values: the reference backend."""

from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.document_mask import Documents, document_mask
from trainer.model.parameters import mark
from trainer.model.positions import alibi_slopes
from trainer.model.precision import Float32Parameters

_GLOBAL_QUERY_BLOCK = 512
_LOCAL_QUERY_BLOCK = 128
_SCORES_AT_ONCE = 1 << 20
"""Scores of a block above which a CPU without gradients works off one row of the batch after the other."""


class ReferenceCoreAttention(MegatronModule, Float32Parameters):
    """Grouped-query attention in plain PyTorch on any device; every other backend is measured against it.

    Queries are worked off in blocks and each block sees only the keys that its window can reach, so a local
    layer costs O(S · W). Scores, bias, softmax and the weighted sum are fp32 in every dtype.
    """

    float32_names = ("slopes",)

    def __init__(
        self, config: VPTransformerConfig, layer_number: int, pg_collection: ProcessGroupCollection, **_: Any
    ) -> None:
        super().__init__(config=config)
        self.tp_group: dist.ProcessGroup = pg_collection.tp
        size, rank = self.tp_group.size(), self.tp_group.rank()
        self.groups = config.num_query_groups // size
        self.heads = config.num_attention_heads // size
        self.scale = config.kv_channels**-0.5
        self.window = config.window if config.is_local(layer_number) else None
        self.softmax_type = config.softmax_type

        self.softmax_offset: nn.Parameter | None
        if config.softmax_type == "learnable":
            offset = nn.Parameter(torch.empty(self.heads, dtype=config.params_dtype))
            self.softmax_offset = mark(offset, partition_dim=0)
        else:
            self.register_parameter("softmax_offset", None)

        slopes = None
        if config.alibi and not config.is_local(layer_number):
            every = alibi_slopes(config.num_attention_heads)
            slopes = torch.tensor(every[rank * self.heads : (rank + 1) * self.heads], dtype=torch.float32)
        self.register_buffer("slopes", slopes, persistent=False)
        self.slopes: torch.Tensor | None

    def forward(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, documents: Documents
    ) -> torch.Tensor:
        """Attend.

        Args:
            query: `[S, B, heads, D]`; head h uses key/value head `h // (heads / groups)`.
            key: `[S, B, groups, D]`.
            value: `[S, B, groups, D]`.
            documents: Of the rows.

        Returns:
            `[S, B, heads · D]` in the dtype of `query`.
        """
        length, batch, heads, dim = query.shape
        per_group = heads // self.groups
        # [S, B, heads, D] -> [B, groups, heads per group, S, D]; keys and values [B, groups, S, D]
        q = (
            query.float().reshape(length, batch, self.groups, per_group, dim).permute(1, 2, 3, 0, 4)
            * self.scale
        )
        k, v = (tensor.float().permute(1, 2, 0, 3) for tensor in (key, value))
        block = _GLOBAL_QUERY_BLOCK if self.window is None else max(_LOCAL_QUERY_BLOCK, 2 * self.window)
        attended = []
        for start in range(0, length, block):
            stop = min(start + block, length)
            first = 0 if self.window is None else max(0, start - self.window + 1)
            i = torch.arange(start, stop, device=q.device)
            j = torch.arange(first, stop, device=q.device)
            allowed = document_mask(i, j, documents.doc_id, self.window)
            distance = i[:, None] - j[None, :]
            attended.append(
                self._attend_block(
                    q[:, :, :, start:stop], k[:, :, first:stop], v[:, :, first:stop], distance, allowed
                )
            )
        out = torch.cat(attended, dim=3)  # [B, groups, heads per group, S, D]
        return out.permute(3, 0, 1, 2, 4).reshape(length, batch, heads * dim).to(query.dtype)

    def attend_cached(
        self,
        query: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        distance: torch.Tensor,
        allowed: torch.Tensor,
    ) -> torch.Tensor:
        """Attend from new tokens to keys kept by a `trainer.decoding.cache.DecodingCache`.

        Same arithmetic as `forward`; the caller, who knows which position each kept key has, brings the
        mask.

        Args:
            query: `[n, B, heads, D]`.
            keys: `[B, groups, m, D]`.
            values: `[B, groups, m, D]`.
            distance: int64 `[B, n, m]`, position of the query minus position of the key.
            allowed: bool `[B, n, m]`; the window is part of it.

        Returns:
            `[n, B, heads · D]` in the dtype of `query`.
        """
        length, batch, heads, dim = query.shape
        q = query.float().reshape(length, batch, self.groups, heads // self.groups, dim)
        q = q.permute(1, 2, 3, 0, 4) * self.scale
        k, v = keys.float(), values.float()
        attended = [
            self._attend_block(
                q[:, :, :, start : start + _GLOBAL_QUERY_BLOCK],
                k,
                v,
                distance[:, None, None, start : start + _GLOBAL_QUERY_BLOCK],
                allowed[:, start : start + _GLOBAL_QUERY_BLOCK],
            )
            for start in range(0, length, _GLOBAL_QUERY_BLOCK)
        ]
        out = attended[0] if len(attended) == 1 else torch.cat(attended, dim=3)
        return out.permute(3, 0, 1, 2, 4).reshape(length, batch, heads * dim).to(query.dtype)

    def attend_slots(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        keys: torch.Tensor,
        values: torch.Tensor,
        positions: torch.Tensor,
    ) -> torch.Tensor:
        """Keep one more key and value of each row, and attend to all that are kept of it.

        Position p of a row has slot `p mod m`, so m slots hold its last m positions: all of them, or a
        window. Asks nothing of the device.

        Args:
            query: `[1, B, heads, D]`.
            key: `[1, B, groups, D]`.
            value: `[1, B, groups, D]`.
            keys: `[B, groups, m, D]`, written to.
            values: `[B, groups, m, D]`, written to.
            positions: int64 `[B]`, of the new tokens.

        Returns:
            `[1, B, heads · D]` in the dtype of `query`.
        """
        slots = keys.shape[2]
        rows, place = torch.arange(len(positions), device=positions.device), positions % slots
        keys[rows, :, place], values[rows, :, place] = key[0], value[0]
        # How far behind the new token that of each slot is; further than its position: there is none yet.
        distance = (positions[:, None] - torch.arange(slots, device=positions.device)) % slots
        allowed = distance <= positions[:, None]
        return self.attend_cached(query, keys, values, distance[:, None], allowed[:, None])

    def _attend_block(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, distance: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """One block; `distance` broadcasts to the scores, `allowed` is `[B, queries, keys]`."""
        batch, groups, per_group, queries, dim = q.shape
        keys = k.shape[2]
        many = q.numel() // dim * keys > _SCORES_AT_ONCE
        if many and q.device.type == "cpu" and not self._differentiated(q, k, v):
            return self._attend_rows(q, k, v, distance, allowed)
        # The heads of a group share their keys: fold them into the rows of one product.
        scores = (q.reshape(batch, groups, per_group * queries, dim) @ k.transpose(-1, -2)).reshape(
            batch, groups, per_group, queries, keys
        )
        if self.slopes is not None:
            scores = scores - self.slopes.view(groups, per_group, 1, 1) * distance
        scores.masked_fill_(~allowed[:, None, None], float("-inf"))  # nobody else has these scores
        probabilities = self._softmax(scores)
        return (probabilities.reshape(batch, groups, per_group * queries, keys) @ v).reshape(q.shape)

    def _differentiated(self, *operands: torch.Tensor) -> bool:
        """Whether a gradient of what comes out can be asked for."""
        parts = operands if self.softmax_offset is None else (*operands, self.softmax_offset)
        return torch.is_grad_enabled() and any(part.requires_grad for part in parts)

    def _attend_rows(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, distance: torch.Tensor, allowed: torch.Tensor
    ) -> torch.Tensor:
        """`_attend_block` without gradients: the same operations, a row of the batch at a time and in place.

        Scores of all rows would be written to fresh memory five times over, whose pages cost a CPU more than
        the arithmetic does.
        """
        batch, groups, per_group, queries, dim = q.shape
        keys = k.shape[2]
        sink = self._sink_scores(per_group, q)
        columns = keys if sink is None else keys + 1
        shared = distance.dim() == 2
        bias = None
        out = torch.empty(q.shape)
        room = torch.empty(groups, per_group, queries, columns)
        scores = room[..., :keys]
        for row in range(batch):
            torch.bmm(
                q[row].reshape(groups, per_group * queries, dim),
                k[row].transpose(-1, -2),
                out=scores.view(groups, per_group * queries, keys),
            )
            if self.slopes is not None:
                if bias is None or not shared:
                    bias = self.slopes.view(groups, per_group, 1, 1) * (distance if shared else distance[row])
                scores.sub_(bias)
            scores.masked_fill_(~allowed[row], float("-inf"))
            if sink is not None:
                room[..., keys:] = sink
            probabilities = room.softmax(dim=-1)[..., :keys]
            torch.bmm(
                probabilities.view(groups, per_group * queries, keys),
                v[row],
                out=out[row].view(groups, per_group * queries, dim),
            )
        return out

    def _softmax(self, scores: torch.Tensor) -> torch.Tensor:
        """Softmax over the last axis; a sink takes its share of the mass, which is then dropped."""
        sink = self._sink_scores(scores.shape[2], scores)
        if sink is None:
            return scores.softmax(dim=-1)
        sink = sink.expand(*scores.shape[:-1], 1)
        return torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]

    def _sink_scores(self, per_group: int, like: torch.Tensor) -> torch.Tensor | None:
        """Return the score of the sink, fp32 `[groups, heads per group, 1, 1]`; None without one."""
        if self.softmax_type == "vanilla":
            return None
        shape = (self.groups, per_group, 1, 1)
        if self.softmax_offset is None:  # off-by-one: a sink fixed at exp(0)
            return like.new_zeros(shape)
        return self.softmax_offset.float().view(shape)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Sinks are split by head."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {"softmax_offset": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )
