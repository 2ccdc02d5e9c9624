"""Positions: GRAPE-M (a rotation with learnable frequencies), RoPE (the same, fixed) and GRAPE-A (ALiBi)."""

import math

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.mapping import ShardedStateDict
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import nn

from trainer.model.config import VPTransformerConfig
from trainer.model.parallel import sum_gradient_over_tp
from trainer.model.parameters import mark
from trainer.model.precision import Float32Parameters, require_float32


def initial_log_freq(head_dim: int, base: float, scale: float) -> torch.Tensor:
    """`log_freq_i = γ ln(base^(−2i/D))`, fp32 `[D/2]`: GRAPE-M starts as RoPE."""
    index = torch.arange(head_dim // 2, dtype=torch.float64)
    return (-scale * math.log(base) * 2.0 * index / head_dim).float()


def cos_sin(position_ids: torch.Tensor, frequency: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cos and sin of `φ(t, i) = t · f_i`.

    Args:
        position_ids: int64 `[B, S]`.
        frequency: fp32 `[D/2]`, or `[heads, D/2]` when every head has its own.

    Returns:
        Two fp32 tensors `[S, B, 1 or heads, D/2]`.
    """
    angle = position_ids.t().float()[:, :, None, None] * frequency.reshape(-1, frequency.shape[-1])
    return angle.cos(), angle.sin()


def rotate(x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Rotate each pair of dimensions `(i, i + D/2)` of `x` `[S, B, heads, D]` (rotate-half)."""
    cos, sin = (part.to(x.dtype) for part in rotation)
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Rope(nn.Module):
    """RoPE (Su et al. 2021) with the donor's base: no parameters."""

    def __init__(self, config: VPTransformerConfig) -> None:
        super().__init__()
        self.head_dim, self.base = config.kv_channels, config.rotation_base

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin for int64 `[B, S]` positions; see `cos_sin`."""
        exponent = (
            torch.arange(0, self.head_dim, 2, device=position_ids.device, dtype=torch.float32) / self.head_dim
        )
        return cos_sin(position_ids, 1.0 / self.base**exponent)


class GrapeM(MegatronModule, Float32Parameters):
    """GRAPE-M: one vector of learnable log-frequencies for the whole model, shared by all local layers.

    `f_i = exp(log_freq_i / γ)`. γ leaves the initial rotation alone and divides the effective learning rate
    of ln f. Computed afresh in every pass, since the frequencies move.
    """

    float32_names = ("log_freq",)

    def __init__(self, config: VPTransformerConfig, tp_group: dist.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.scale, self.shared = config.log_freq_scale, config.share_rotation_across_heads
        shape: tuple[int, ...] = (config.kv_channels // 2,)
        if not self.shared:
            shape = (config.num_attention_heads // tp_group.size(), *shape)
        self.log_freq = mark(
            nn.Parameter(torch.empty(shape, dtype=torch.float32), requires_grad=config.learnable_rotation),
            keep_fp32=True,
            adamw_only=True,
            partition_dim=None if self.shared else 0,
        )

    def forward(self, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cos and sin for int64 `[B, S]` positions; see `cos_sin`."""
        log_freq = require_float32(self.log_freq, "rotary_pos_emb.log_freq")
        if self.shared:
            log_freq = sum_gradient_over_tp(log_freq, self.tp_group)
        return cos_sin(position_ids, torch.exp(log_freq / self.scale))

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None
    ) -> ShardedStateDict:
        """Per-head frequencies are split by head; a shared vector is replicated."""
        return make_sharded_tensors_for_checkpoint(
            self.state_dict(prefix="", keep_vars=True),
            prefix,
            {} if self.shared else {"log_freq": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=(metadata or {}).get("dp_cp_group"),
        )


def alibi_slopes(heads: int) -> list[float]:
    """Slopes of ALiBi (Press et al. 2022), one per head.

    For a power of two: `m_h = 2^(−8(h+1)/n)`. Otherwise the slopes of the largest power of two below, then
    every second slope of the next one.
    """
    closest = 2 ** (heads.bit_length() - 1)

    def powers(count: int) -> list[float]:
        return [2.0 ** (-8.0 * (index + 1) / count) for index in range(count)]

    return powers(closest) + powers(2 * closest)[0::2][: heads - closest]
